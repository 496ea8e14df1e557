"""Competence: the share of the rows that is trained on grows by a formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_cli.curriculum.pacing import Pacing, Share, num_rows
from pocl_cli.curriculum.scheduler import StagedScheduler, joined
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers


@schedulers.register("competence")
@dataclass(frozen=True, kw_only=True)
class Competence(StagedScheduler):
    """Stage i of n trains on the easiest share of the rows, which grows from `initial` to all (`pacing.py`).

    Platanios et al. 2019, arXiv 1903.09848: its linear and square-root competence, with i/(n−1) for the share t/T of
    the training that is done.

    Deviation: the share grows from stage to stage, there from step to step; and a stage goes through its rows in
    epochs, there each batch is drawn from them.
    """

    pacing: Pacing
    initial: Share

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        record_ids = joined(subsets)
        sizes = num_rows(self.stages, self.pacing, self.initial, of=len(record_ids))
        return self._staged([record_ids[:size] for size in sizes])
