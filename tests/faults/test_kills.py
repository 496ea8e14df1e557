"""SIGKILL anywhere in the four commands: what is visible is whole, and a rerun ends in undisturbed bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pocl_cli import faults

from ..support.tally import trial
from ..support.trials import Child, attempt, check_nothing_is_left, check_visible_is_whole, rerun, results
from .conftest import Reference

# The full tier is cut into parts that several processes share; how many events there are is known at run time only.
NUM_PARTS = 40
NUM_RANDOM = 50


def kind_of(event: str) -> str:
    if event == "step":
        return "an optimizer step"
    return "a file operation" if event in faults.FILE_EVENTS else "the start of a load, a measurement or a commit"


def check_ends_in_the_same_bytes(folder: Path, reference: Reference) -> None:
    check_visible_is_whole(folder)
    rerun(folder)
    check_visible_is_whole(folder)
    assert results(folder) == reference.results
    check_nothing_is_left(folder)


def check_kill(folder: Path, number: int, reference: Reference) -> None:
    """Kills at one event, looks at what is visible, runs again, and compares."""
    event, what = reference.events[number - 1]
    with trial(f"SIGKILL at {kind_of(event)}: the rerun ends in the same bytes"):
        ended = attempt(folder, fault=f"kill:any:{number}")
        assert ended.code == -signal.SIGKILL, ended.stderr
        assert ended.stderr.splitlines()[-1].startswith(f"fault: kill:any:{number} at {event} "), (what, ended.stderr)
        check_ends_in_the_same_bytes(folder, reference)
    shutil.rmtree(folder)


def test_recipe_when_it_is_traced_then_it_is_small_and_has_two_stages(reference: Reference) -> None:
    assert 20 <= len(reference.numbers("step")) <= 40
    assert len(reference.numbers(*faults.FILE_EVENTS)) > 500
    assert {event for event, _ in reference.events} == set(faults.EVENTS) - {"any", "file"}
    assert sum(name.endswith("model.safetensors") for name in reference.results) >= 2
    assert sum(name.endswith("consumed.parquet") for name in reference.results) == 2


@pytest.mark.parametrize("share", [0.08, 0.4, 0.75, 0.97])
def test_commands_when_killed_at_an_optimizer_step_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference, share: float
) -> None:
    steps = reference.numbers("step")
    check_kill(tmp_path / "trial", steps[int(share * len(steps))], reference)


@pytest.mark.parametrize("share", [number / 10 + 0.03 for number in range(10)])
def test_commands_when_killed_at_a_file_operation_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference, share: float
) -> None:
    operations = reference.numbers(*faults.FILE_EVENTS)
    check_kill(tmp_path / "trial", operations[int(share * len(operations))], reference)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_commands_when_killed_at_every_event_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference, part: int
) -> None:
    for number in range(part + 1, len(reference.events) + 1, NUM_PARTS):
        check_kill(tmp_path / str(number), number, reference)


def check_killed_recovery(folder: Path, first: int, second: int, reference: Reference) -> None:
    """Kills at an event, and the run that recovers from it at an event of its own."""
    with trial("SIGKILL, and again at a file operation of the recovery: the third run ends in the same bytes"):
        assert attempt(folder, fault=f"kill:any:{first}").code == -signal.SIGKILL
        recovering = attempt(folder, fault=f"kill:file:{second}")
        assert recovering.code == -signal.SIGKILL, recovering.stderr
        assert f"fault: kill:file:{second} at " in recovering.stderr
        check_ends_in_the_same_bytes(folder, reference)
    shutil.rmtree(folder)


def commits(reference: Reference) -> list[int]:
    """The numbers of the renames that make something visible, and of the events just before and after."""
    renames = [number for number in reference.numbers("rename") if ".work" not in reference.events[number - 1][1]]
    return [number + offset for number in renames for offset in (-1, 0, 1)]


@pytest.mark.parametrize(
    "second", [pytest.param(second, marks=[] if second == 3 else pytest.mark.faults) for second in range(1, 13)]
)
def test_recovery_when_it_is_killed_too_then_a_third_run_ends_in_the_same_bytes(
    tmp_path: Path, reference: Reference, second: int
) -> None:
    every = commits(reference)
    for first in every[second :: max(1, len(every) // 4)]:
        check_killed_recovery(tmp_path / str(first), first, second, reference)


def check_random_kill(folder: Path, seed: int, reference: Reference) -> None:
    """Kills after a random time of the work; where that is over too soon, draws again."""
    draws = random.Random(seed)
    with trial("SIGKILL at a random moment of the four commands: the rerun ends in the same bytes"):
        for place in range(100):
            child = Child(folder / str(place))
            time.sleep(draws.uniform(0, reference.seconds))
            os.kill(child.pid, signal.SIGKILL)
            if child.ended().code == -signal.SIGKILL:
                break
        assert child.ended().code == -signal.SIGKILL, "no kill came before the end of the work"
        check_ends_in_the_same_bytes(child.folder, reference)
    shutil.rmtree(folder)


@pytest.mark.parametrize("seed", range(2))
def test_commands_when_killed_at_a_random_moment_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference, seed: int
) -> None:
    check_random_kill(tmp_path / "trials", seed, reference)


@pytest.mark.faults
@pytest.mark.parametrize("first", range(100, 100 + NUM_RANDOM, 10))
def test_commands_when_killed_at_fifty_random_moments_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference, first: int
) -> None:
    for seed in range(first, first + 10):
        check_random_kill(tmp_path / str(seed), seed, reference)
