"""Competence: the share of the rows that is trained on grows by a formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pocl_cli.curriculum.scheduler import StagedScheduler, joined
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers

_POWERS = {"linear": 1, "root": 2}


@schedulers.register("competence")
@dataclass(frozen=True, kw_only=True)
class Competence(StagedScheduler):
    """Stage i of n trains on the easiest c of the rows, c = (s·(1 − c0^p) + c0^p)^(1/p) with s = i/(n−1).

    c0 is `initial`; p is 1 for `linear` and 2 for `root` pacing. One stage has all rows. Platanios et al. 2019,
    arXiv 1903.09848: its linear and square-root competence, with s for the share t/T of the training that is done.

    Deviation: the share grows from stage to stage, there from step to step; and a stage goes through its rows in
    epochs, there each batch is drawn from them.
    """

    pacing: Literal["linear", "root"]
    initial: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        record_ids = joined(subsets)
        sizes = [max(round(share * len(record_ids)), 1) for share in self._shares()]
        return self._staged([record_ids[:size] for size in sizes])

    def _shares(self) -> list[float]:
        power = _POWERS[self.pacing]
        first = self.initial**power
        before = [index / (self.stages - 1) for index in range(self.stages - 1)]
        return [min((done * (1 - first) + first) ** (1 / power), 1.0) for done in before] + [1.0]
