"""SIGTERM and SIGINT in every phase of the four commands: exit 143 or 130, soon, and a rerun ends in the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ..support.tally import trial
from ..support.trials import attempt, check_nothing_is_left, check_visible_is_whole, rerun, results
from .conftest import Reference

ENDS_WITHIN_SECONDS = 10
NUM_MOMENTS = 5
# Events that follow a commit's first one and belong to it, however few files it has.
OF_A_COMMIT = 20


def commit_of(kind: str, reference: Reference, *, place: int = -1) -> int:
    """The number of the event with which the commit of a kind's artifact began; of several the one at `place`."""
    made = {Path(what).name for event, what in reference.events if event == "rename" and f"/{kind}/" in what}
    return [number for number in reference.numbers("commit") if reference.events[number - 1][1] in made][place]


def between(reference: Reference, start: int, end: int, wanted: Callable[[str, str], bool]) -> list[int]:
    return [
        number
        for number, (event, what) in enumerate(reference.events, start=1)
        if start < number <= end and wanted(event, what)
    ]


def phases(reference: Reference) -> dict[str, list[int]]:
    """The numbers of the events in which each phase is under way."""
    teacher, student = (commit_of("students", reference, place=place) for place in (0, 1))
    scores, partition, evaluation = (
        commit_of(kind, reference) for kind in ("scores", "partitions", "evaluations")
    )  # fmt: skip
    steps = between(reference, partition, student, lambda event, what: event == "step")
    last = len(reference.events)
    return {
        "a model is loaded": reference.numbers("load"),
        "score measures": between(reference, teacher, partition, lambda event, what: event == "measure"),
        "score answers": between(reference, teacher, partition, lambda event, what: event == "decode"),
        "score commits": list(range(scores, scores + OF_A_COMMIT)),
        "partition": between(reference, scores + OF_A_COMMIT, partition + OF_A_COMMIT, lambda event, what: True),
        "the first stage": steps[:8],
        "the second stage": steps[8:],
        "dev rows are answered": between(reference, partition, student, lambda event, what: event == "decode"),
        "a checkpoint is written": between(reference, partition, student, lambda event, what: "/.partial-" in what),
        "between the stages": between(reference, partition, student, lambda event, what: "-00000008-001" in what),
        "distill commits": list(range(student, student + OF_A_COMMIT)),
        "evaluate answers": between(reference, student, evaluation, lambda event, what: event == "decode"),
        "evaluate commits": list(range(evaluation, min(evaluation + OF_A_COMMIT, last))),
    }


PHASES = (
    "a model is loaded", "score measures", "score answers", "score commits", "partition", "the first stage",
    "the second stage", "dev rows are answered", "a checkpoint is written", "between the stages", "distill commits",
    "evaluate answers", "evaluate commits",
)  # fmt: skip
# One moment of these belongs to the fast tier.
FAST = {"a model is loaded", "score answers", "the second stage", "between the stages", "evaluate commits"}


def moments(numbers: list[int], num: int) -> list[int]:
    """`num` of the numbers, evenly spread."""
    return [numbers[int((place + 0.5) / num * len(numbers))] for place in range(num)]


def check_signal(folder: Path, action: str, number: int, reference: Reference) -> None:
    expected = signal.SIGTERM if action == "term" else signal.SIGINT
    code = 128 + expected
    with trial(f"{expected.name} in a phase: exit {code} within 10 s, and the rerun ends in the same bytes"):
        ended = attempt(folder, fault=f"{action}:any:{number}")
        assert ended.fault_struck, ended.stderr
        assert ended.code == code, ended.stderr
        assert ended.seconds_after_fault is None or ended.seconds_after_fault < ENDS_WITHIN_SECONDS
        assert ended.stderr.splitlines()[-1].startswith(f"pocl: error: interrupted — {expected.name}"), ended.stderr
        check_visible_is_whole(folder)
        rerun(folder)
        check_visible_is_whole(folder)
        assert results(folder) == reference.results, f"{action} at event {number}"
        check_nothing_is_left(folder)


def test_phases_when_listed_then_each_has_events_of_its_own(reference: Reference) -> None:
    found = phases(reference)
    assert tuple(found) == PHASES
    assert all(found.values()), {phase: len(numbers) for phase, numbers in found.items()}
    assert all(first < second for first, second in pairwise(found["the first stage"] + found["the second stage"]))


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase in FAST else pytest.mark.faults) for phase in PHASES]
)
def test_commands_when_terminated_in_a_phase_then_exit_143_and_a_rerun_ends_in_the_same_bytes(
    tmp_path: Path, reference: Reference, phase: str
) -> None:
    (number,) = moments(phases(reference)[phase], 1)
    check_signal(tmp_path / "trial", "term", number, reference)


@pytest.mark.faults
@pytest.mark.parametrize("phase", PHASES)
def test_commands_when_terminated_at_five_moments_of_a_phase_then_exit_143_and_a_rerun_ends_in_the_same_bytes(
    tmp_path: Path, reference: Reference, phase: str
) -> None:
    for number in moments(phases(reference)[phase], NUM_MOMENTS):
        folder = tmp_path / f"{number}-{len(list(tmp_path.iterdir()))}"
        check_signal(folder, "term", number, reference)


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase == "score commits" else pytest.mark.faults) for phase in PHASES]
)
def test_commands_when_interrupted_in_a_phase_then_exit_130_and_a_rerun_ends_in_the_same_bytes(
    tmp_path: Path, reference: Reference, phase: str
) -> None:
    (number,) = moments(phases(reference)[phase], 1)
    check_signal(tmp_path / "trial", "int", number, reference)
