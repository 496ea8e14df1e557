"""The partition: rows from easy to hard, cut into subsets, and what is worth knowing about each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from pocl_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa


class SubsetSummary(TypedDict):
    """One subset. `rouge_l` is the mean F1 × 100, `cross_entropy` the mean of the rows' nats per response token.

    Means are None where nothing was measured; `sample_instructions` are the beginnings of those of the easiest, the
    middle and the hardest row.
    """

    subset: int
    num_rows: int
    rouge_l: float | None
    cross_entropy: float | None
    num_prompt_tokens: float | None
    num_response_tokens: float | None
    sample_instructions: list[str]


# What the means of a summary are taken of.
SUMMARISED = ("rouge_l", "cross_entropy", "num_prompt_tokens", "num_response_tokens")


def cut(num_rows: int, num_subsets: int) -> tuple[range, ...]:
    """Subsets of ⌊N/n⌋ rows, as their places in the order (0 = easiest); the last takes the rest.

    POCL, arXiv 2506.05695.

    Args:
        num_rows: N.
        num_subsets: n, at least 1.

    Raises:
        DataError: there are no rows.
        ConfigError: there are more subsets than rows.
    """
    assert num_subsets >= 1, f"a partition into {num_subsets} subsets"
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
    return tuple(range(start, end) for start, end in zip(starts, ends, strict=True))


def cut_at_quantiles(
    ordered: npt.NDArray[np.float64], num_subsets: int, shares: Sequence[float] | None
) -> tuple[range, ...]:
    """Subsets that end at quantiles of the difficulty, so that rows of equal difficulty are in one subset.

    Args:
        ordered: difficulties of all rows, ascending.
        num_subsets: n.
        shares: the share of the rows (0..1) below each of the n − 1 borders, ascending; None: i/n.

    Raises:
        DataError: there are no rows.
        ConfigError: a subset would be empty.
    """
    num_rows = len(cut(len(ordered), 1)[0])
    if shares is None:
        below = [index * num_rows // num_subsets for index in range(1, num_subsets)]
    else:
        assert len(shares) == num_subsets - 1, f"{len(shares)} borders between {num_subsets} subsets"
        below = [round(share * num_rows) for share in shares]
    return cut_at_thresholds(ordered, [float(ordered[max(number, 1) - 1]) for number in below])


def cut_at_thresholds(ordered: npt.NDArray[np.float64], thresholds: Sequence[float]) -> tuple[range, ...]:
    """Subsets that end at given difficulties: subset i holds the rows above threshold i − 1 and not above threshold i.

    Args:
        ordered: difficulties of all rows, ascending.
        thresholds: the borders, ascending, in the unit of the difficulty.

    Raises:
        DataError: there are no rows.
        ConfigError: a subset would be empty.
    """
    cut(len(ordered), 1)
    borders = [0, *np.searchsorted(ordered, thresholds, side="right").tolist(), len(ordered)]
    subsets = tuple(range(start, end) for start, end in itertools.pairwise(borders))
    empty = [index for index, subset in enumerate(subsets) if not subset]
    if empty:
        raise ConfigError(
            f"subset {empty[0]} of {len(subsets)} is empty",
            where="partition.at",
            why=(
                f"no row lies between its borders; the difficulties go from {ordered[0]:.6g} to {ordered[-1]:.6g}, and"
                f" {len(np.unique(ordered))} of {len(ordered)} differ"
            ),
            fix="move the borders, set fewer curriculum.stages, or partition.by=counts",
        )
    return subsets


def sample_places(subset: range) -> list[int]:
    """The places of the easiest, the middle and the hardest row of a subset, each named once."""
    return sorted({subset[0], subset[len(subset) // 2], subset[-1]})


def partition_summary(
    subsets: Sequence[range], ordered: pa.Table, instructions: Mapping[int, str]
) -> list[SubsetSummary]:
    """What `summary.json` and the table on the terminal show of every subset.

    Args:
        subsets: the partition, as `cut` gives it.
        ordered: the rows, easiest first, with those columns of `SUMMARISED` that were measured.
        instructions: the beginnings of the instructions at `sample_places`, by place.
    """
    return [
        SubsetSummary(
            subset=index,
            num_rows=len(subset),
            rouge_l=None if (rouge := _mean(ordered, "rouge_l", subset)) is None else 100 * rouge,
            cross_entropy=_mean(ordered, "cross_entropy", subset),
            num_prompt_tokens=_mean(ordered, "num_prompt_tokens", subset),
            num_response_tokens=_mean(ordered, "num_response_tokens", subset),
            sample_instructions=[instructions[place] for place in sample_places(subset)],
        )
        for index, subset in enumerate(subsets)
    ]


def _mean(ordered: pa.Table, name: str, subset: range) -> float | None:
    """The mean of a column over a subset; None where the column, or a value of it, is missing."""
    if name not in ordered.column_names:
        return None
    column = ordered[name].slice(subset.start, len(subset))
    return None if column.null_count else math.fsum(column.to_numpy()) / len(subset)
