"""No curriculum: every stage trains on all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pocl_cli.curriculum.scheduler import StagedScheduler, joined
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers


@schedulers.register("none")
@dataclass(frozen=True, kw_only=True)
class Flat(StagedScheduler):
    """All rows in every stage: ordinary distillation in one stage, the ramps-only control of POCL in several.

    POCL, arXiv 2506.05695. The rows may come as one subset or as several.
    """

    needs_partition: ClassVar[bool] = False

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        return self._staged([joined(subsets)] * self.stages)
