"""Partitions with known ids."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_cli.curriculum.partition import cut
from pocl_cli.records import Subset
from pocl_cli.registry import schedulers


def make_subsets(ordered_ids: Sequence[str], num_subsets: int) -> list[Subset]:
    """The subsets of rows that are ordered already, easiest first."""
    parts = cut(len(ordered_ids), num_subsets)
    return [Subset(index, tuple(ordered_ids[part.start : part.stop])) for index, part in enumerate(parts)]


def with_exposure() -> list[tuple[str, str]]:
    """Every scheduler with every exposure that it has: balancing needs the rows of all stages beforehand."""
    return [
        (name, exposure)
        for name in schedulers.names()
        for exposure in ("epochs", "balanced")
        if (name, exposure) != ("self_paced", "balanced")
    ]
