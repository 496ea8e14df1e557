"""Which rows the optimizer sees when: a pure function of (seed, stage, epoch), so that resuming is an integer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.seeds import permutation


class Sampler:
    """The global batches of one stage, in order.

    Args:
        stage: whose record ids are shuffled anew in each epoch.
        seed: the training seed.
        global_batch_size: sequences per optimizer step.
        drop_last: leave out the last, smaller batch of every epoch.
    """

    def __init__(self, stage: Stage, *, seed: int, global_batch_size: int, drop_last: bool) -> None:
        self.stage, self.seed, self.global_batch_size = stage, seed, global_batch_size
        whole, rest = divmod(len(stage.record_ids), global_batch_size)
        self.steps_per_epoch = whole if drop_last or not rest else whole + 1
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that the stage's step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> list[str]:
        """The record ids of the stage's optimizer step `step`, counted from 0."""
        order = self._order(self.epoch(step))
        start = step % self.steps_per_epoch * self.global_batch_size
        return order[start : start + self.global_batch_size]

    def _epoch_order(self, epoch: int) -> list[str]:
        ids = self.stage.record_ids
        return [ids[i] for i in permutation(len(ids), self.seed, "order", self.stage.index, epoch)]


def micro_batches(rows: Sequence[TokenisedRow], max_tokens: int) -> list[list[TokenisedRow]]:
    """`rows` in groups of like length whose padded size (rows × longest) stays within `max_tokens`.

    A row that is longer than the budget makes a group of its own.
    """
    groups: list[list[TokenisedRow]] = []
    for row in sorted(rows, key=lambda row: (row.num_tokens, row.id)):
        # Sorted by length: the newest row is the longest of its group.
        if groups and row.num_tokens * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
