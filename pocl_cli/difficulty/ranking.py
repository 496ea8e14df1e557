"""From difficulties to one order, easiest first, that depends on the rows' content and never on the file's order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pocl_cli.difficulty.scores import FloatArray, IntArray, Scores, require_finite

if TYPE_CHECKING:
    import pyarrow as pa

MOST = 0.5


def average_ranks(values: FloatArray) -> FloatArray:
    """Ranks of `values` `[N]`, 1 = smallest; tied values share the mean of the ranks that they cover."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts - 1) / 2)[position]
    return ranks


def rank_rows(ids: pa.ChunkedArray, difficulty: FloatArray) -> IntArray:
    """Positions of the rows `[N]`, easiest first; rows of equal difficulty follow each other by record id.

    Args:
        ids: record ids `[N]`, distinct; by the bytes of their UTF-8, which is the order of their code points.
        difficulty: `[N]`, higher = harder.

    Raises:
        NonFiniteError: a difficulty is NaN or infinite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    assert difficulty.shape == (len(ids),), f"{len(ids)} ids and difficulties of shape {difficulty.shape}"
    require_finite(ids, difficulty, "difficulty")
    rows = pa.table({"difficulty": difficulty, "id": ids})
    order = pc.sort_indices(rows, sort_keys=[("difficulty", "ascending"), ("id", "ascending")])
    positions: IntArray = order.to_numpy().astype(np.int64)
    return positions


def tie_share(values: FloatArray) -> float:
    """Fraction (0..1) of the rows that share the most common value; 0 for no rows or where all values differ.

    Many small groups of equal values still order the rows; one large group is file order in disguise.
    """
    if len(values) == 0:
        return 0.0
    _, counts = np.unique(values, return_counts=True)
    largest = int(counts.max())
    return largest / len(values) if largest > 1 else 0.0


def tie_shares(scores: Scores, needs: Iterable[str], difficulty: FloatArray) -> dict[str, float]:
    """`tie_share` of every column that the measurer reads and, under `difficulty`, of what it made of them."""
    shares = {column: tie_share(scores.column(column)) for column in sorted(needs)}
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
