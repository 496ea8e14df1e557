"""Which rows the optimizer sees when: a pure function of (seed, stage, epoch), so that resuming is an integer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.seeds import permutation

IntArray = npt.NDArray[np.int64]

# What one more forward and backward pass costs, in tokens that could have been padding instead: launching the layers,
# reading the weights, adding up the gradient of the output layer.
GROUP_OVERHEAD_TOKENS = 256


class Sampler:
    """The global batches of one stage, in order.

    Args:
        stage: whose record ids are shuffled anew in each epoch; those with `times` are spread evenly over the epochs.
        seed: the training seed.
        global_batch_size: sequences per optimizer step.
        drop_last: leave out the last, smaller batch of every epoch.
    """

    def __init__(self, stage: Stage, *, seed: int, global_batch_size: int, drop_last: bool) -> None:
        self.stage, self.seed, self.global_batch_size = stage, seed, global_batch_size
        whole, rest = divmod(len(stage.record_ids), global_batch_size)
        self.steps_per_epoch = whole if drop_last or not rest else whole + 1
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)
        self._places = self._spread(stage.times) if stage.times is not None else None

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
        shuffled = permutation(len(ids), self.seed, "order", self.stage.index, epoch)
        if self._places is not None:
            # One stage alone may have more steps than its epochs (max_steps): it goes through them again.
            start = epoch % self.stage.epochs * len(ids)
            shuffled = self._places[start : start + len(ids)][shuffled]
        return [ids[i] for i in shuffled]

    def _spread(self, times: Sequence[int]) -> IntArray:
        """The place of every draw's row, [epochs × rows]: the draws of each row at equal distances, from its own first.

        So every epoch has as many draws as the stage has rows, and a row is in each as often as in the others, or once
        more.
        """
        counts = np.array(times, dtype=np.int64)
        total = len(counts) * self.stage.epochs
        assert counts.sum() == total, f"{counts.sum()} draws in a stage of {total}"
        first = (permutation(len(counts), self.seed, "spread", self.stage.index) + 0.5) / len(counts)
        places = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        spread: IntArray = places[np.argsort((number + first[places]) / counts[places], kind="stable")]
        return spread


def share(rows: Sequence[TokenisedRow], rank: int, size: int) -> list[TokenisedRow]:
    """The rows of a global batch that process `rank` of `size` works on; about the same number of tokens in each.

    The longest rows are dealt first, each to the process with the fewest tokens so far, so that no two processes are
    further apart than the longest row. Where there are fewer rows than processes, some get none.
    """
    shares: list[list[TokenisedRow]] = [[] for _ in range(size)]
    tokens = [0] * size
    for row in sorted(rows, key=lambda row: (-row.num_tokens, row.id)):
        least = min(range(size), key=tokens.__getitem__)
        shares[least].append(row)
        tokens[least] += row.num_tokens
    return shares[rank]


def micro_batches(rows: Sequence[TokenisedRow], max_tokens: int, *, packs: bool = False) -> list[list[TokenisedRow]]:
    """`rows` in groups of like length, with the least work in all, each within `max_tokens` tokens.

    A group costs its tokens plus `GROUP_OVERHEAD_TOKENS`. Its tokens are those of its rows where the model `packs`
    them one after another, else rows × longest. A row that is longer than `max_tokens` makes a group of its own.
    """
    ordered = sorted(rows, key=lambda row: (row.num_tokens, row.id))
    lengths = [row.num_tokens for row in ordered]
    before = [0, *itertools.accumulate(lengths)]

    def tokens(start: int, end: int) -> int:
        return before[end] - before[start] if packs else (end - start) * lengths[end - 1]

    # least[j]: the work of the j shortest rows in their best groups; border[j]: where the last of these groups starts.
    least, border, first = [0], [0], 0
    for end in range(1, len(ordered) + 1):
        while first < end - 1 and tokens(first, end) > max_tokens:
            first += 1
        best = min(range(first, end), key=lambda start: least[start] + tokens(start, end))
        least.append(least[best] + tokens(best, end) + GROUP_OVERHEAD_TOKENS)
        border.append(best)
    groups: list[list[TokenisedRow]] = []
    end = len(ordered)
    while end > 0:
        groups.append(ordered[border[end] : end])
        end = border[end]
    return groups[::-1]
