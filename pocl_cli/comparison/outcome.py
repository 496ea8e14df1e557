"""What one run of a comparison left: its answers row by row, its figures, and what it spent."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pocl_cli.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from pocl_cli.artifacts.manifest import Artifact
    from pocl_cli.comparison.arms import Cell
    from pocl_cli.comparison.matching import Spent
    from pocl_cli.comparison.statistics import Floats

# The metrics that have a value for every answer, in the order of the tables.
ANSWER_METRICS = ("rouge_l", "exact_match")
DEV_METRICS = ("dev_rouge_l", "dev_cross_entropy")


@dataclass(frozen=True)
class Answers:
    """The answers to one data set. `values` holds each metric × 100 `[P]`, the mean over the decoding seeds."""

    ids: tuple[str, ...]
    values: Mapping[str, Floats]


@dataclass(frozen=True)
class Outcome:
    """One trained and evaluated student.

    Attributes:
        cell: its place in the comparison.
        answers: by data set.
        metrics: by data set, as in `metrics.json`.
        dev: the dev figures of the state that was kept; empty without a dev evaluation.
        spent: what the training took.
        train_seconds: wall time of its steps, dev evaluations and interruptions left out.
    """

    cell: Cell
    answers: Mapping[str, Answers]
    metrics: Mapping[str, Mapping[str, Any]]
    dev: Mapping[str, float]
    spent: Spent
    train_seconds: float


def read_outcome(cell: Cell, planned: Spent, student: Artifact, evaluation: Artifact) -> Outcome:
    """Reads the artifacts of a run; `planned` is what its stages say that it spends."""
    lines = _lines(student.path / "metrics.jsonl")
    tokens = [line["num_tokens"] for line in lines if "num_tokens" in line]
    table = json.loads((student.path / "stages.json").read_text(encoding="utf-8"))
    assert tuple(row["steps"] for row in table if row["steps"]) == planned.steps, f"{cell} ran by another plan"
    extra = student.manifest.extra
    return Outcome(
        cell=cell,
        answers=_answers(_lines(evaluation.path / "predictions.jsonl")),
        metrics=json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))["datasets"],
        dev={name: extra[name] for name in DEV_METRICS if name in extra},
        spent=replace(planned, response_tokens=tokens[-1] if tokens else None),
        train_seconds=_train_seconds(_lines(student.path / "timings.jsonl")),
    )


def check_same_prompts(outcomes: Sequence[Outcome]) -> None:
    """Raises DataError where the runs answered other rows than the first: they could not be paired."""
    first = outcomes[0]
    for other in outcomes[1:]:
        for name, answers in first.answers.items():
            if other.answers[name].ids != answers.ids:
                raise DataError(
                    f"{other.cell} answered other rows of {name} than {first.cell}",
                    where="the comparison",
                    why=f"{len(other.answers[name].ids)} and {len(answers.ids)} rows are left after tokenising",
                    fix="compare students that share a tokenizer, or give the test set long_prompts=cut",
                )


def _answers(lines: Sequence[Mapping[str, Any]]) -> dict[str, Answers]:
    """By data set: the rows in the order of the first decoding seed, their values averaged over the seeds."""
    found = {}
    for name, of_dataset in itertools.groupby(lines, key=lambda line: line["dataset"]):
        by_id: dict[str, list[Mapping[str, Any]]] = {}
        for line in of_dataset:
            by_id.setdefault(line["id"], []).append(line)
        values = {
            # An exact match is true or false, a ROUGE-L is × 100 already.
            metric: np.array(
                [
                    math.fsum(100.0 * line[metric] if isinstance(line[metric], bool) else line[metric] for line in rows)
                    / len(rows)
                    for rows in by_id.values()
                ]
            )
            for metric in ANSWER_METRICS
        }
        found[name] = Answers(tuple(by_id), values)
    return found


def _train_seconds(timings: Sequence[Mapping[str, Any]]) -> float:
    """A line tells the pace of the steps since the line before."""
    steps = [0, *(line["step"] for line in timings)]
    num_steps = [after - before for before, after in itertools.pairwise(steps)]
    return math.fsum(line["seconds"] * number for line, number in zip(timings, num_steps, strict=True))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
