"""Outcomes of runs that never were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pocl_cli.comparison.arms import Cell
from pocl_cli.comparison.matching import Spent
from pocl_cli.comparison.outcome import Answers, Outcome
from pocl_cli.schema import ComparisonConfig


def make_comparison(**changes: Any) -> ComparisonConfig:
    values: dict[str, Any] = {
        "name": "mine",
        "arms": {"flat": ("curriculum=none",), "pocl": ()},
        "only": None,
        "baseline": "flat",
        "steps_of": None,
        "methods": None,
        "seeds": (1, 2),
        "num_jobs": None,
        "confidence": 0.95,
        "num_resamples": 200,
        "resampling_seed": 0,
    }
    return ComparisonConfig.model_validate(values | changes)


def make_outcome(cell: Cell, rouge_l: Sequence[float], *, steps: Sequence[int] = (10,), dev: bool = True) -> Outcome:
    """Answers to one data set "toy", half of them easy and half hard; an answer is exact where its ROUGE-L is 100."""
    values = np.array(rouge_l, dtype=float)
    exact = np.where(values == 100, 100.0, 0.0)
    half = len(values) // 2
    levels = {"a/easy": values[:half], "b/hard": values[half:]}
    per_category = {name: {"mean": float(part.mean()), "num_rows": len(part)} for name, part in levels.items()}
    return Outcome(
        cell=cell,
        answers={"toy": Answers(tuple(f"r{i}" for i in range(len(values))), {"rouge_l": values, "exact_match": exact})},
        metrics={
            "toy": {
                "rouge_l": {"mean": float(values.mean()), "per_category": per_category},
                "exact_match": {"mean": float(exact.mean())},
                "cross_entropy": {"mean": 2.0 + cell.seed},
            }
        },
        dev={"dev_rouge_l": 50.0 + cell.seed, "dev_cross_entropy": 1.0} if dev else {},
        spent=Spent(tuple(steps), tuple(steps), len(steps), (0.1, 0.0), 4, 100 * cell.seed),
        train_seconds=float(cell.seed),
    )
