"""A run that is killed anywhere and started again leaves the bytes of one that nobody disturbed."""

from __future__ import annotations

import itertools
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_cli import faults
from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ArtifactError
from pocl_cli.records import Convergence
from pocl_cli.run import Run
from pocl_cli.steps import partition
from pocl_cli.trackers import TrackerRun
from pocl_cli.training.loop import TrainingJob, train

from ..support.aborts import AbortAtOperation, Aborted, abort_after
from ..support.folders import memory_folder
from ..support.processes import die, die_at_operation, forked
from ..support.recipe import changed, compose, distilled, promised_hashes, recipe, write_inputs
from ..support.training import make_job, make_student, toy_rows, train_lines, two_stages

NUM_STEPS, NUM_DEV_LINES = 24, 5


# ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────


def small_job(folder: Path, *, checkpoint_every: int = 2, method: str = "fkl", **changes: Any) -> TrainingJob:
    """2 + 4 steps with everything that has state: dropout, two stages, dev evaluations, the best state handed on."""
    return make_job(
        folder,
        student=make_student(method, dropout=0.1),
        rows=toy_rows(8),
        evaluates=True,
        keep_best=True,
        checkpoint_every=checkpoint_every,
        **changes,
    )


def result(folder: Path, job: TrainingJob) -> dict[str, str]:
    """Hashes of what the loop left, the final checkpoint among it."""
    train(job)
    newest = max(path for path in (folder / "checkpoints").iterdir() if path.name[0].isdigit())
    files = [newest / "model.safetensors", folder / "metrics.jsonl", folder / "consumed.parquet"]
    return {path.name: sha256_file(path) for path in files}


@pytest.fixture(scope="module")
def undisturbed_loop() -> dict[str, str]:
    with memory_folder() as folder:
        return result(folder, small_job(folder))


def test_loop_when_aborted_at_any_file_operation_then_ends_in_the_same_bytes(tmp_path, monkeypatch, undisturbed_loop):
    for n in itertools.count(1):
        folder, abort = tmp_path / str(n), AbortAtOperation(n)
        with monkeypatch.context() as patched, suppress(Aborted):
            patched.setattr(faults, "hook", abort)
            train(small_job(folder))
        torch.manual_seed(n)  # what a new process draws before does not matter
        assert result(folder, small_job(folder)) == undisturbed_loop, f"aborted at operation {n}"
        assert not list(folder.glob("checkpoints/.partial-*"))
        shutil.rmtree(folder)
        if not abort.fired:
            break

    assert n > 80, "the hook is called before every write, flush, rename and removal"


def test_loop_when_killed_again_and_again_then_ends_in_the_same_bytes(tmp_path, undisturbed_loop):
    def killed_at(n: int) -> None:
        die_at_operation(n)
        train(small_job(tmp_path))

    died = [forked(lambda: killed_at(n)) for n in (12, 40, 35, 9)]  # noqa: B023 - called at once

    assert result(tmp_path, small_job(tmp_path)) == undisturbed_loop
    assert died == [signal.SIGKILL] * 4


@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_loop_when_the_next_stage_keeps_the_optimizer_then_ends_in_the_same_bytes(tmp_path, checkpoint_every):
    kept = [replace(stage, restart_optimizer=False, restart_lr=False) for stage in two_stages(toy_rows(8))]
    undisturbed = result(tmp_path / "undisturbed", small_job(tmp_path / "undisturbed", stages=kept))

    for step in range(1, 6):
        job = small_job(tmp_path / str(step), stages=kept, checkpoint_every=checkpoint_every)
        with suppress(Aborted):
            train(replace(job, show=abort_after(step)))
        again = small_job(tmp_path / str(step), stages=kept, checkpoint_every=checkpoint_every)
        assert result(tmp_path / str(step), again) == undisturbed, f"aborted after step {step}"


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_loop_when_stages_end_early_then_ends_in_the_same_bytes(tmp_path, checkpoint_every):
    rule = Convergence(metric="dev_rouge_l", patience=1, min_epochs=1)
    stages = [replace(stage, convergence=rule) for stage in two_stages(toy_rows(8), epochs=6)]
    undisturbed = result(tmp_path / "undisturbed", small_job(tmp_path / "undisturbed", stages=stages))
    steps = [line["step"] for line in train_lines(tmp_path / "undisturbed")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < sum(row["steps"] for row in small_job(tmp_path, stages=stages).table)

    for step in steps:
        job = small_job(tmp_path / str(step), stages=stages, checkpoint_every=checkpoint_every)
        with suppress(Aborted):
            train(replace(job, show=abort_after(step)))
        again = small_job(tmp_path / str(step), stages=stages, checkpoint_every=checkpoint_every)
        assert result(tmp_path / str(step), again) == undisturbed, f"aborted after step {step}"


@pytest.mark.parametrize("checkpoint_every", [1, 1000])
def test_loop_when_checkpoints_are_made_otherwise_then_ends_in_the_same_bytes(
    tmp_path, undisturbed_loop, checkpoint_every
):
    assert result(tmp_path, small_job(tmp_path, checkpoint_every=checkpoint_every)) == undisturbed_loop


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("step", range(3, 7))
def test_loop_when_the_newest_checkpoint_is_damaged_then_goes_on_from_the_one_before_to_the_same_bytes(
    tmp_path, caplog, undisturbed_loop, step
):
    with pytest.raises(Aborted):
        train(replace(small_job(tmp_path, checkpoint_every=1), show=abort_after(step)))
    newest = max((tmp_path / "checkpoints").glob("*-*/model.safetensors"))
    flip_a_byte(newest)

    with caplog.at_level(logging.WARNING):
        assert result(tmp_path, small_job(tmp_path, checkpoint_every=1)) == undisturbed_loop

    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [newest.parent.name in warning for warning in warnings] == [True]


def job_that_evolves(folder: Path) -> TrainingJob:
    """The job above with a method whose weight of the teacher depends on the divergences of all steps before."""
    job = small_job(folder, checkpoint_every=1, method="taid")
    job.student.method = replace(job.student.method, rate=0.9, momentum=0.5)
    return job


def newest_method_state(folder: Path) -> bytes:
    return max((folder / "checkpoints").glob("*-*/method.safetensors")).read_bytes()


@pytest.mark.parametrize("steps", [(1,), (2, 1), (4,), (5,)])
def test_loop_when_a_method_with_a_state_is_interrupted_then_ends_in_the_same_bytes(tmp_path, steps):
    whole = result(tmp_path / "whole", job_that_evolves(tmp_path / "whole"))

    for step in steps:
        with pytest.raises(Aborted):
            train(replace(job_that_evolves(tmp_path / "cut"), show=abort_after(step)))

    assert result(tmp_path / "cut", job_that_evolves(tmp_path / "cut")) == whole
    assert newest_method_state(tmp_path / "cut") == newest_method_state(tmp_path / "whole")


def test_loop_when_the_saved_state_of_a_method_is_damaged_then_goes_on_from_the_checkpoint_before(tmp_path):
    whole = result(tmp_path / "whole", job_that_evolves(tmp_path / "whole"))
    with pytest.raises(Aborted):
        train(replace(job_that_evolves(tmp_path / "cut"), show=abort_after(5)))

    flip_a_byte(max((tmp_path / "cut" / "checkpoints").glob("*-*/method.safetensors")))

    assert result(tmp_path / "cut", job_that_evolves(tmp_path / "cut")) == whole


# ── the step ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Recipe:
    """The tiny recipe with its partition made, and the hashes of an undisturbed run."""

    folder: Path
    run: Run
    undisturbed: Mapping[str, str]

    def run_in(self, outputs: Path, **sections: Any) -> Run:
        """The run in a copy of the outputs that were there before `distill`."""
        if not outputs.exists():
            shutil.copytree(self.folder / "before", outputs, symlinks=True)
        return changed(self.run, outputs=outputs, **sections)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Recipe]:
    with memory_folder() as folder:
        write_inputs(folder / "inputs")
        run = compose(recipe(folder / "inputs", folder / "before"))
        partition.run(run.for_step("partition"))
        made = Recipe(folder, run, {})
        yield replace(made, undisturbed=promised_hashes(distilled(made.run_in(folder / "undisturbed")).path))


@dataclass(frozen=True)
class DyingTracker:
    """Lets the process die at its n-th line (from 1), before anything of that line is on the disk."""

    n: int

    def check(self) -> None:
        """Needs no package."""

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        return _DyingRun(self.n)


class _DyingRun(TrackerRun):
    def __init__(self, n: int) -> None:
        self.left = itertools.count(n - 1, -1)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if next(self.left) == 0:
            die()

    def close(self, failed: bool = False) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    "n",
    [pytest.param(n, marks=[] if n % 4 == 1 else pytest.mark.faults) for n in range(1, NUM_STEPS + NUM_DEV_LINES + 1)],
)
def test_distill_when_killed_at_any_optimizer_step_or_evaluation_then_ends_in_the_same_bytes(tmp_path, tiny, n):
    outputs = tmp_path / "outputs"
    assert forked(lambda: distilled(tiny.run_in(outputs, tracker=DyingTracker(n)))) == signal.SIGKILL

    artifact = distilled(tiny.run_in(outputs))

    assert promised_hashes(artifact.path) == tiny.undisturbed
    assert sorted(path.name for path in (outputs / ".work").iterdir()) == []


# Every operation of a commit is killed in the tests of artifacts, every one of the loop is aborted above.
@pytest.mark.parametrize("n", range(3, 255, 18))
def test_distill_when_killed_at_a_file_operation_then_ends_in_the_same_bytes(tmp_path, tiny, n):
    outputs = tmp_path / "outputs"

    def killed() -> None:
        die_at_operation(n)
        distilled(tiny.run_in(outputs))

    assert forked(killed) == signal.SIGKILL
    assert promised_hashes(distilled(tiny.run_in(outputs)).path) == tiny.undisturbed


def test_distill_on_the_students_own_answers_when_killed_then_ends_in_the_same_bytes(tmp_path):
    write_inputs(tmp_path / "inputs")
    words = ["kd_method=gkd", "kd_method.max_new_tokens=6"]
    run = compose(recipe(tmp_path / "inputs", tmp_path / "outputs", *words))
    undisturbed = distilled(changed(run, outputs=tmp_path / "undisturbed"))

    assert forked(lambda: distilled(changed(run, tracker=DyingTracker(13)))) == signal.SIGKILL
    assert newest_checkpoint(tmp_path / "outputs") > ""

    assert promised_hashes(distilled(run).path) == promised_hashes(undisturbed.path)
    lines = train_lines(undisturbed.path)
    assert {line["generated_rows"] for line in lines} == {0, 3}
    assert all(1 <= line["generated_tokens"] <= 6 for line in lines if line["generated_rows"])
    # Of answers that have just been written, nothing is stored.
    assert not list((tmp_path / "outputs").glob("teacher_signals/*"))


def test_distill_when_every_checkpoint_is_damaged_then_stops_with_exit_code_4(tmp_path, tiny):
    outputs = tmp_path / "outputs"
    forked(lambda: distilled(tiny.run_in(outputs, tracker=DyingTracker(20))))
    (work,) = (path for path in (outputs / ".work").iterdir() if path.is_dir())
    checkpoints = list((work / "checkpoints").glob("*-*/model.safetensors"))
    for path in checkpoints:
        flip_a_byte(path)

    with pytest.raises(ArtifactError, match="every checkpoint is damaged") as caught:
        distilled(tiny.run_in(outputs))

    assert caught.value.exit_code == 4
    assert len(checkpoints) == 2
    assert f"rm -r {work}" in str(caught.value)
    shutil.rmtree(work)  # as it says
    assert promised_hashes(distilled(tiny.run_in(outputs)).path) == tiny.undisturbed


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────

# So many steps that a signal comes long before the last of them.
LONG = ("curriculum.epochs_per_stage=8", "train.evaluate_every=8")


def start(inputs: Path, outputs: Path) -> subprocess.Popen[str]:
    """The real command, with a checkpoint after every step."""
    command = [str(Path(sys.executable).with_name("pocl")), "distill"]
    overrides = recipe(inputs, outputs, *LONG, "train.checkpoint_every=1")
    return subprocess.Popen([*command, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def newest_checkpoint(outputs: Path) -> str:
    return max((path.name for path in outputs.glob(".work/*/checkpoints/[0-9]*-*")), default="")


def signalled(process: subprocess.Popen[str], outputs: Path, number: int) -> str:
    """Sends the signal when a new checkpoint is there; what the command wrote to stderr."""
    before = newest_checkpoint(outputs)
    while newest_checkpoint(outputs) <= before and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert stdout == ""
    return stderr


def test_command_when_interrupted_twice_then_exits_143_and_130_and_a_rerun_ends_in_the_same_bytes(tmp_path):
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    write_inputs(inputs)

    reached = []
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(inputs, outputs)
        stderr = signalled(process, outputs, number)
        assert process.returncode == 128 + number, stderr
        assert stderr.splitlines()[-1] == (
            f"pocl: error: interrupted — {number.name}; all finished steps are saved — "
            "the same command goes on from there"
        )
        reached.append(newest_checkpoint(outputs))
    assert "" < reached[0] < reached[1]

    interrupted = distilled(compose(recipe(inputs, outputs, *LONG)))
    undisturbed = distilled(compose(recipe(inputs, tmp_path / "undisturbed", *LONG)))
    assert promised_hashes(interrupted.path) == promised_hashes(undisturbed.path)
    assert train_lines(interrupted.path)[-1]["step"] == 96
    assert list((outputs / ".work").iterdir()) == []
