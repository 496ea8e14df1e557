"""`pocl distill` in two processes: the numbers of one process, and what becomes of a run when one of them ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from ..support.command import Finished, Running, run_pocl, start_pocl
from ..support.folders import memory_folder
from ..support.proc import family, open_to_others, parent
from ..support.recipe import promised_hashes, recipe, write_inputs
from ..support.tally import trial

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and a kernel that ends a process with its parent"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used autograd beside a GPU cannot fork"),
]

# 40 + 80 steps, so that there is time to disturb them.
LONG = ("curriculum.epochs_per_stage=10", "train.evaluate_every=5", "train.checkpoint_every=10", "student.dropout=0")
TWO = ("hardware=cpu_2", "hardware.timeout_seconds=10")


@dataclass(frozen=True)
class Place:
    """Where runs on the same inputs keep their outputs."""

    folder: Path

    def words(self, outputs: str, *changes: str) -> list[str]:
        return ["distill", *recipe(self.folder / "inputs", self.folder / outputs, *LONG, *changes)]

    def start(self, outputs: str, *changes: str) -> Running:
        return start_pocl(*self.words(outputs, *changes), cwd=self.folder)

    def run(self, outputs: str, *changes: str) -> Finished:
        return run_pocl(*self.words(outputs, *changes), cwd=self.folder)

    def work(self, outputs: str) -> list[Path]:
        """Of the student, while it is made."""
        return [path.parent for path in (self.folder / outputs / ".work").glob("*/checkpoints")]

    def step(self, outputs: str) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        steps = [int(path.name[:8]) for work in self.work(outputs) for path in work.glob("checkpoints/[0-9]*-*")]
        return max(steps, default=0)

    def workers(self, outputs: str) -> dict[int, int]:
        """The process ids by rank."""
        notes = (self.folder / outputs / ".work").glob("*/workers/*/process-*.json")
        return {int(note.stem.partition("-")[2]): json.loads(note.read_bytes())["pid"] for note in notes}


@dataclass(frozen=True)
class Undisturbed:
    """A run in one process, and two in two processes each that went side by side."""

    alone: Path
    together: Path
    others: Path
    reachable: set[str]
    num_processes: int


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with memory_folder() as folder:
        write_inputs(folder / "inputs")
        yield Place(folder)


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Undisturbed:
    reachable: set[str] = set()
    num_processes = 0
    first, second = place.start("together", *TWO), place.start("others", *TWO, "train.seed=11")

    def look() -> None:
        nonlocal num_processes
        pids = family(first.pid)
        reachable.update(open_to_others(pids))
        num_processes = max(num_processes, len(pids))

    together, others = first.wait(200, look), second.wait()
    alone = place.run("alone")
    for finished in (together, others, alone):
        assert finished.exit_code == 0, finished.stderr
    paths = [place.folder / finished.stdout.strip() for finished in (alone, together, others)]
    return Undisturbed(*paths, reachable, num_processes)


def lines(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_when_they_train_then_every_step_has_the_numbers_of_one_process(undisturbed: Undisturbed) -> None:
    alone, together = lines(undisturbed.alone), lines(undisturbed.together)
    assert [line.keys() for line in together] == [line.keys() for line in alone]
    assert sum("loss" in line for line in alone) == 120
    for one, two in list(zip(alone, together, strict=True))[:24]:
        assert two == pytest.approx(one, rel=1e-5)
    assert pq.read_table(undisturbed.together / "consumed.parquet") == pq.read_table(
        undisturbed.alone / "consumed.parquet"
    )


def test_audit_when_two_processes_train_then_says_what_it_says_of_one(undisturbed: Undisturbed) -> None:
    alone, together = (
        json.loads((run / "manifest.json").read_bytes())["audit"] for run in (undisturbed.alone, undisturbed.together)
    )
    assert together == alone
    assert [(stage["stage"], stage["steps"], stage["subsets"]) for stage in alone] == [(0, 40, [0]), (1, 80, [0, 1])]


def test_two_runs_when_side_by_side_in_two_processes_each_then_both_end(undisturbed: Undisturbed) -> None:
    assert undisturbed.together.name != undisturbed.others.name
    assert {path.name for path in undisturbed.together.iterdir()} == {path.name for path in undisturbed.alone.iterdir()}


def test_processes_when_they_work_then_no_other_machine_can_reach_them(undisturbed: Undisturbed) -> None:
    assert undisturbed.num_processes >= 4, "the command, an agent and two workers were looked at"
    assert undisturbed.reachable == set()


def test_run_when_each_of_its_processes_is_killed_in_turn_then_ends_in_the_same_bytes(
    place: Place, undisturbed: Undisturbed
) -> None:
    for victim, exit_code, words in (
        ("worker", 8, ["worker process 1 of 2 was ended by SIGKILL"]),
        ("agent", 8, ["the process that starts the workers was ended by SIGKILL"]),
        ("command", -signal.SIGKILL, []),
    ):
        before = place.step("killed")
        finished = disturbed(place, "killed", lambda pids, victim=victim: os.kill(pids[victim], signal.SIGKILL))
        assert finished.exit_code == exit_code, finished.stderr
        for word, error in zip(words, finished.errors, strict=True):
            assert word in error
        assert place.step("killed") > before
    assert place.step("killed") < 120

    finished = place.run("killed", *TWO)
    assert finished.exit_code == 0, finished.stderr
    assert "resuming after step" in finished.stderr
    assert promised_hashes(place.folder / finished.stdout.strip()) == promised_hashes(undisturbed.together)


def test_run_when_interrupted_or_stopped_then_says_so_and_goes_on_with_as_many_processes_only(
    place: Place, undisturbed: Undisturbed
) -> None:
    started = time.monotonic()
    finished = disturbed(place, "interrupted", lambda pids: os.kill(pids["command"], signal.SIGTERM))
    assert finished.exit_code == 143, finished.stderr
    assert "all finished steps are saved" in finished.errors[0]

    finished = disturbed(place, "interrupted", lambda pids: os.kill(pids["worker"], signal.SIGSTOP))
    assert finished.exit_code == 8, finished.stderr
    assert len(finished.errors) == 1
    assert time.monotonic() - started < 90

    finished = place.run("interrupted", *TWO, "hardware.num_processes=3")
    assert finished.exit_code == 4, finished.stderr
    assert "num_processes: 2 → 3" in finished.errors[0]

    finished = place.run("interrupted", *TWO)
    assert finished.exit_code == 0, finished.stderr
    assert promised_hashes(place.folder / finished.stdout.strip()) == promised_hashes(undisturbed.together)


def test_processes_when_each_has_a_part_of_the_student_then_stop_together_and_end_with_the_numbers_of_one(
    place: Place, undisturbed: Undisturbed
) -> None:
    in_parts = "hardware.parallel=fsdp"
    finished = disturbed(place, "parts", lambda pids: os.kill(pids["command"], signal.SIGTERM), in_parts)
    assert finished.exit_code == 143, finished.stderr
    assert "all finished steps are saved" in finished.errors[0]
    assert 0 < place.step("parts") < 120

    finished = place.run("parts", *TWO, in_parts)
    assert finished.exit_code == 0, finished.stderr
    parts = place.folder / finished.stdout.strip()
    assert parts.name == undisturbed.alone.name
    for one, other in list(zip(lines(parts), lines(undisturbed.alone), strict=True))[:24]:
        assert one == pytest.approx(other, rel=1e-5)
    weights, expected = (load_file(run / "model" / "model.safetensors") for run in (parts, undisturbed.alone))
    assert {name: (one.shape, one.dtype) for name, one in weights.items()} == {
        name: (one.shape, one.dtype) for name, one in expected.items()
    }


def test_worker_when_its_training_is_not_finite_then_its_own_error_is_what_the_command_shows(place: Place) -> None:
    finished = place.run("infinite", *TWO, "train.lr=1e30", "train.lr_end=0")
    assert finished.exit_code == 7
    assert len(finished.errors) == 1
    assert "the loss is nan in stage 0, step 2" in finished.errors[0]
    assert "records" in finished.errors[0]


@pytest.mark.faults
@pytest.mark.parametrize("run", range(10))
@pytest.mark.parametrize("victim", ["worker", "agent", "command"])
def test_processes_when_one_is_killed_three_times_then_none_is_left_and_the_run_ends_in_the_same_bytes(
    place: Place, undisturbed: Undisturbed, victim: str, run: int
) -> None:
    draws, outputs = random.Random(f"{victim} {run}"), f"{victim}-{run}"

    def kill(pids: dict[str, int]) -> None:
        time.sleep(draws.uniform(0, 0.3))
        os.kill(pids[victim], signal.SIGKILL)

    for _ in range(3):
        with trial(f"SIGKILL of the {victim} of a run in two processes: none of its processes is left"):
            assert disturbed(place, outputs, kill).exit_code in (8, -signal.SIGKILL)
    with trial("SIGKILL at three moments of a run in two processes: the rerun ends in the same bytes"):
        finished = place.run(outputs, *TWO)
        assert finished.exit_code == 0, finished.stderr
        assert promised_hashes(place.folder / finished.stdout.strip()) == promised_hashes(undisturbed.together)
    shutil.rmtree(place.folder / outputs)


def disturbed(place: Place, outputs: str, disturb: Callable[[dict[str, int]], object], *changes: str) -> Finished:
    """A run in two processes that something happens to some steps after its start; none of its processes is left."""
    running = place.start(outputs, *TWO, *changes)
    before, pids, whole = place.step(outputs), dict[str, int](), set[int]()

    def wait_for_steps() -> None:
        workers = place.workers(outputs)
        if pids or len(workers) < 2 or place.step(outputs) < before + 10:
            return
        pids.update({"worker": workers[1], "command": running.pid})
        pids["agent"] = parent(workers[0])
        whole.update(family(running.pid))
        disturb(pids)

    finished = running.wait(meanwhile=wait_for_steps)
    assert len(whole) == 4, finished.stderr
    deadline = time.monotonic() + 5
    while (left := {pid for pid in whole if family(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "a few seconds later nothing is left of the command, its agent and its workers"
    return finished
