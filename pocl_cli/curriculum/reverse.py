"""Reverse: growing sets, hardest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_cli.curriculum.scheduler import StagedScheduler, joined
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers


@schedulers.register("reverse")
@dataclass(frozen=True, kw_only=True)
class Reverse(StagedScheduler):
    """Stage i of n trains on the subsets n−1−i..n−1 together: Baby Step with the order turned round, its control.

    The ramps are not turned round. POCL, arXiv 2506.05695; the anti-curriculum of Hacohen & Weinshall 2019,
    arXiv 1904.03626.
    """

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        assert len(subsets) == self.stages, f"{self.stages} stages over a partition of {len(subsets)} subsets"
        return self._staged([joined(subsets[self.stages - 1 - index :]) for index in range(self.stages)])
