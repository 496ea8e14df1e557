"""The same command twice at once: one works, the other says who does within two seconds, or waits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ..support.tally import trial
from ..support.trials import Child, Ended, check_nothing_is_left, check_visible_is_whole, rerun, results
from .conftest import Reference

TOLD_WITHIN_SECONDS = 2
NUM_PAIRS = 100


def started_together(folder: Path, *, waits: bool) -> list[tuple[Ended, float]]:
    """Two processes that begin the same command at the same moment: how each ended, and after how many seconds."""
    gate, opener = os.pipe()
    os.set_inheritable(opener, False)
    children = [Child(folder, gate=gate, closes=opener, waits=waits) for _ in range(2)]
    os.close(gate)
    os.close(opener)
    started = time.monotonic()
    ended: dict[int, tuple[Ended, float]] = {}
    while len(ended) < 2:
        for number, child in enumerate(children):
            if number not in ended and child.has_ended():
                ended[number] = (child.ended(), time.monotonic() - started)
        time.sleep(0.005)
        assert time.monotonic() - started < 60, "a process hangs"
    return list(ended.values())


def check_pair(folder: Path, reference: Reference) -> None:
    with trial("two starts at once: one works, the other exits 6 within 2 s"):
        told, worked = sorted(started_together(folder, waits=False), key=lambda pair: -pair[0].code)
        assert (told[0].code, worked[0].code) == (6, 0), told[0].stderr + worked[0].stderr
        assert told[1] < TOLD_WITHIN_SECONDS
        last = told[0].stderr.splitlines()[-1]
        assert last.startswith("pocl: error: "), last
        assert "is being made by another process" in last
        assert "--wait" in last
        check_visible_is_whole(folder)
        assert results(folder) == reference.results
        check_nothing_is_left(folder)


def test_command_when_started_twice_at_once_then_one_works_and_the_other_exits_6(
    tmp_path: Path, reference: Reference
) -> None:
    for number in range(3):
        check_pair(tmp_path / str(number), reference)


@pytest.mark.faults
@pytest.mark.parametrize("first", range(0, NUM_PAIRS, 10))
def test_command_when_a_hundred_pairs_start_then_each_has_one_winner(
    tmp_path: Path, reference: Reference, first: int
) -> None:
    for number in range(first, first + 10):
        check_pair(tmp_path / str(number), reference)


def test_command_when_it_waits_for_another_then_both_succeed_and_the_work_is_done_once(
    tmp_path: Path, reference: Reference
) -> None:
    folder = tmp_path / "trial"

    ended = started_together(folder, waits=True)

    assert [one.code for one, _ in ended] == [0, 0]
    assert sum("waiting for " in one.stderr for one, _ in ended) >= 1
    assert results(folder) == reference.results
    check_nothing_is_left(folder)


def test_command_when_the_one_it_waits_for_is_killed_then_it_takes_over(tmp_path: Path, reference: Reference) -> None:
    folder = tmp_path / "trial"
    rerun(folder, "partition")
    first = Child(folder, "distill", "stop:step:12")
    first.has_said("fault: stop:step:12 ")
    second = Child(folder, waits=True)
    second.has_said("waiting for students/")

    os.kill(first.pid, signal.SIGKILL)

    assert first.ended().code == -signal.SIGKILL
    ended = second.ended()
    assert ended.code == 0, ended.stderr
    assert "resuming after step 10 " in ended.stderr, ended.stderr
    assert results(folder) == reference.results
    check_nothing_is_left(folder)
