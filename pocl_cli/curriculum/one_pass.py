"""One-pass: from one subset to the next, without going back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_cli.curriculum.scheduler import StagedScheduler
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers


@schedulers.register("one_pass")
@dataclass(frozen=True, kw_only=True)
class OnePass(StagedScheduler):
    """Stage i trains on subset i alone, easiest first: the easier rows are dropped.

    The one-pass curriculum of Bengio et al. 2009 (ICML), so named and compared with Baby Step by Cirik et al. 2016,
    arXiv 1611.06204.
    """

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        assert len(subsets) == self.stages, f"{self.stages} stages over a partition of {len(subsets)} subsets"
        return self._staged([subset.record_ids for subset in subsets])
