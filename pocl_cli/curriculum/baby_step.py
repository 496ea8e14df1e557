"""Baby Step: growing sets, easiest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_cli.curriculum.scheduler import StagedScheduler, joined
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers


@schedulers.register("baby_step")
@dataclass(frozen=True, kw_only=True)
class BabyStep(StagedScheduler):
    """Stage i trains on subsets 0..i together; temperature and kd_ratio rise. POCL, arXiv 2506.05695."""

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        assert len(subsets) == self.stages, f"{self.stages} stages over a partition of {len(subsets)} subsets"
        return self._staged([joined(subsets[: index + 1]) for index in range(self.stages)])
