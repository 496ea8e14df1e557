"""From difficulties to one order, easiest first, that depends on the rows' content and never on the file's order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np

from pocl_cli.difficulty.columns import Column, FloatArray, measured, require_finite
from pocl_cli.records import ScoredRecord

MOST = 0.5


def average_ranks(values: FloatArray) -> FloatArray:
    """Ranks of `values` `[N]`, 1 = smallest; tied values share the mean of the ranks that they cover."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts - 1) / 2)[position]
    return ranks


def rank_rows(ids: Sequence[str], difficulty: FloatArray) -> list[int]:
    """Positions of the rows, easiest first; rows of equal difficulty follow each other by record id.

    Args:
        ids: record ids `[N]`, distinct.
        difficulty: `[N]`, higher = harder.

    Raises:
        NonFiniteError: a difficulty is NaN or infinite.
    """
    assert difficulty.shape == (len(ids),), f"{len(ids)} ids and difficulties of shape {difficulty.shape}"
    assert len(set(ids)) == len(ids), "record ids must be distinct"
    require_finite(ids, difficulty, "difficulty")
    values = difficulty.tolist()
    return sorted(range(len(ids)), key=lambda position: (values[position], ids[position]))


def tie_share(values: FloatArray) -> float:
    """Fraction (0..1) of the rows that share the most common value; 0 for no rows or where all values differ.

    Many small groups of equal values still order the rows; one large group is file order in disguise.
    """
    if len(values) == 0:
        return 0.0
    _, counts = np.unique(values, return_counts=True)
    largest = int(counts.max())
    return largest / len(values) if largest > 1 else 0.0


def tie_shares(rows: Sequence[ScoredRecord], needs: Iterable[str], difficulty: FloatArray) -> dict[str, float]:
    """`tie_share` of every column that the measurer reads and, under `difficulty`, of what it made of them."""
    shares = {column: tie_share(measured(rows, cast(Column, column))) for column in sorted(needs)}
    return {**shares, "difficulty": tie_share(difficulty)}


def tie_warning(shares: Mapping[str, float]) -> str | None:
    """A sentence for the user where most rows tie in something that the order rests on, else None."""
    tied = [f"{share:.1%} in {name}" for name, share in shares.items() if share > MOST]
    if not tied:
        return None
    return (
        f"most rows share one value ({', '.join(tied)}): they share one rank there, and what stays equal is ordered by"
        " record id, which says nothing about difficulty; a stronger student or another difficulty separates them"
    )
