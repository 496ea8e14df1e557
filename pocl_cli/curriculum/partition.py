"""The partition: rows from easy to hard, cut into subsets, and what is worth knowing about each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import Record, ScoredRecord, Subset


class SubsetSummary(TypedDict):
    """One subset. `rouge_l` is the mean F1 × 100, `cross_entropy` the mean of the rows' nats per response token.

    Means are None where nothing was measured; `sample_instructions` are of the easiest, the middle and the hardest row.
    """

    subset: int
    num_rows: int
    rouge_l: float | None
    cross_entropy: float | None
    num_prompt_tokens: float | None
    num_response_tokens: float | None
    sample_instructions: list[str]


def cut(ordered_ids: Sequence[str], num_subsets: int) -> tuple[Subset, ...]:
    """Subsets of ⌊N/n⌋ rows in the given order; the last takes the rest. POCL, arXiv 2506.05695.

    Args:
        ordered_ids: record ids `[N]`, easiest first.
        num_subsets: n, at least 1.

    Raises:
        DataError: there are no rows.
        ConfigError: there are more subsets than rows.
    """
    assert num_subsets >= 1, f"a partition into {num_subsets} subsets"
    num_rows = len(ordered_ids)
    if num_rows == 0:
        raise DataError(
            "no rows to cut into subsets", where="the partition", fix="check dataset.path and dataset.limit"
        )
    if num_subsets > num_rows:
        raise ConfigError(
            f"{num_subsets} subsets of {num_rows} rows",
            where="curriculum.stages",
            why="every subset needs at least one row",
            fix=f"set curriculum.stages to {num_rows} or less, or use more rows (dataset.limit, dataset.dev_size)",
        )
    size = num_rows // num_subsets
    starts = [index * size for index in range(num_subsets)]
    ends = [*starts[1:], num_rows]
    return tuple(
        Subset(index, tuple(ordered_ids[start:end]))
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def partition_summary(
    subsets: Sequence[Subset], records: Mapping[str, Record], scored: Mapping[str, ScoredRecord]
) -> list[SubsetSummary]:
    """What `summary.json` and the table on the terminal show of every subset.

    Args:
        subsets: the partition.
        records: every row of it, by id.
        scored: the student's measurements of every row, by id; empty where the difficulty needed none.
    """
    return [_subset_summary(subset, records, scored) for subset in subsets]


def _subset_summary(subset: Subset, records: Mapping[str, Record], scored: Mapping[str, ScoredRecord]) -> SubsetSummary:
    ids = subset.record_ids
    rows = [scored[record_id] for record_id in ids] if scored else []
    rouge = _mean(row.rouge_l for row in rows)
    samples = sorted({0, len(ids) // 2, len(ids) - 1})
    return SubsetSummary(
        subset=subset.index,
        num_rows=len(ids),
        rouge_l=None if rouge is None else 100 * rouge,
        cross_entropy=_mean(row.cross_entropy for row in rows),
        num_prompt_tokens=_mean(row.num_prompt_tokens for row in rows),
        num_response_tokens=_mean(row.num_response_tokens for row in rows),
        sample_instructions=[records[ids[position]].instruction for position in samples],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None for no values, or where one of them is missing."""
    present: list[float] = []
    for value in values:
        if value is None:
            return None
        present.append(value)
    return math.fsum(present) / len(present) if present else None
