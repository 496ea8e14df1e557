"""Self-paced: the rows that the student itself finds easy, as it stands when a stage begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocl_cli.curriculum.pacing import Pacing, Share, num_rows
from pocl_cli.curriculum.scheduler import StagedScheduler, joined
from pocl_cli.curriculum.selecting import FloatArray
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers


@schedulers.register("self_paced")
@dataclass(frozen=True, kw_only=True)
class SelfPaced(StagedScheduler):
    """A stage trains on the rows of lowest cross entropy under the student at its beginning; their share grows.

    The share goes from `initial` to all rows (`pacing.py`). The hard weights of self-paced learning, Kumar et al. 2010
    (NIPS): those samples are trained on whose loss is below a threshold, which rises until all of them are.

    Deviation: the threshold is the cross entropy below which the stage's share of the rows lies, so that the number of
    steps is known; it moves from stage to stage, not with every update; and the loss is the cross entropy of the
    response, not that of the distillation.

    Raises ValueError where `exposure` is balanced: how often a row is still to be seen is not known beforehand.
    """

    needs_partition: ClassVar[bool] = False

    pacing: Pacing
    initial: Share

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exposure == "balanced":
            raise ValueError(
                "exposure=balanced needs the rows of all stages beforehand, and self_paced chooses those of a stage"
                " when it begins; set exposure=epochs"
            )

    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        record_ids = joined(subsets)
        sizes = num_rows(self.stages, self.pacing, self.initial, of=len(record_ids))
        return self._staged([record_ids[:size] for size in sizes])

    def rows_for_stage(self, stage: Stage, ids: Sequence[str], cross_entropy: FloatArray) -> tuple[str, ...]:
        """As `Selecting.rows_for_stage`: the easiest, of equal ones those of lower id; in the order of `ids`."""
        easiest = np.lexsort((np.asarray(ids), cross_entropy))[: len(stage.record_ids)]
        # In the order of the rows: two processes and one, whose ranks differ by rounding, then draw the same batches.
        return tuple(ids[place] for place in np.sort(easiest))
