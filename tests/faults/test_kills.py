"""SIGKILL at every event of all four commands, and at random moments: a rerun ends in an undisturbed run's bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from pocl_cli import faults

from ..support.trials import Child, attempt, check_nothing_is_left, check_visible_is_whole, rerun, results
from .conftest import Reference

# The full tier is cut into parts that several processes share; how many events there are is known at run time only.
NUM_PARTS = 20
NUM_RANDOM = 50


def check_kill(folder: Path, number: int, reference: Reference) -> None:
    """Kills at one event, looks at what is visible, runs again, and compares."""
    ended = attempt(folder, fault=f"kill:any:{number}")
    assert ended.code == -signal.SIGKILL, ended.stderr
    event, what = reference.events[number - 1]
    assert ended.stderr.splitlines()[-1].startswith(f"fault: kill:any:{number} at {event} "), ended.stderr
    check_visible_is_whole(folder)
    rerun(folder)
    check_visible_is_whole(folder)
    assert results(folder) == reference.results, f"killed at event {number}, {event} {what}"
    check_nothing_is_left(folder)
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


def check_random_kill(folder: Path, seed: int, reference: Reference) -> bool:
    """Kills after a random time of the work, twice in a row; whether both came before its end."""
    struck = []
    for moment in (random.Random(seed).uniform(0, 0.9), random.Random(-seed).uniform(0, 0.6)):
        child = Child(folder)
        time.sleep(moment)
        os.kill(child.pid, signal.SIGKILL)
        struck.append(child.ended().code == -signal.SIGKILL)
        check_visible_is_whole(folder)
    rerun(folder)
    check_visible_is_whole(folder)
    assert results(folder) == reference.results, f"killed at random moments of seed {seed}"
    check_nothing_is_left(folder)
    return all(struck)


def check_random_kills(folder: Path, seeds: range, reference: Reference) -> None:
    struck = [check_random_kill(folder / str(seed), seed, reference) for seed in seeds]
    assert sum(struck) >= len(seeds) / 2, "most kills come before the end of the work"


def test_commands_when_killed_at_random_moments_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference
) -> None:
    check_random_kills(tmp_path, range(1, 3), reference)


@pytest.mark.faults
@pytest.mark.parametrize("first", range(100, 100 + NUM_RANDOM, 10))
def test_commands_when_killed_at_fifty_random_moments_then_end_in_the_same_bytes(
    tmp_path: Path, reference: Reference, first: int
) -> None:
    check_random_kills(tmp_path, range(first, first + 10), reference)
