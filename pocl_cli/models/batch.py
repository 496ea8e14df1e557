"""Rows as one run of tokens, without padding: what a model reads, and whose hidden states are wanted.

B rows, L positions of the longest row, T tokens of all rows, N response tokens.
"""

# ruff: noqa: N815 (fields carry shape suffixes too)
from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class PaddedRows(NamedTuple):
    """Rows side by side, padded on the right with token 0. Causal models need no mask: none sees what follows."""

    input_ids_BL: Tensor
    selected_N: Tensor  # index among B·L of every token whose next one is a response token


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows one after another.

    Attributes:
        ids: record ids of the B rows.
        lengths: prompt and response tokens of each row.
        response_lengths: those of its response, or what else of it counts.
        input_ids_T: prompt and response of each row.
        position_ids_T: each token's place in its row.
        selected_N: index among T of every token whose next one is a response token: those whose hidden states count.
        targets_N: the response tokens.
    """

    ids: tuple[str, ...]
    lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    input_ids_T: Tensor
    position_ids_T: Tensor
    selected_N: Tensor
    targets_N: Tensor

    @property
    def num_response_tokens(self) -> int:
        return self.targets_N.shape[0]

    def padded(self) -> PaddedRows:
        """The same rows side by side. Waits for no device: every size is known beforehand."""
        longest = max(self.lengths)
        cells_T = _cells(self.lengths, longest).to(self.input_ids_T.device, non_blocking=True)
        input_ids_BL = self.input_ids_T.new_zeros(len(self.lengths) * longest)
        input_ids_BL = input_ids_BL.index_copy(0, cells_T, self.input_ids_T).view(-1, longest)
        return PaddedRows(input_ids_BL, cells_T[self.selected_N])

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = (self.input_ids_T, self.position_ids_T, self.selected_N, self.targets_N)
        return Batch(self.ids, self.lengths, self.response_lengths, *(_moved(tensor, device) for tensor in tensors))


def make_batch(
    ids: Iterable[str], rows: Sequence[Sequence[int]], selected: Sequence[range], targets: Sequence[int]
) -> Batch:
    """Rows of token ids as a batch; `selected` holds the wanted positions of each row."""
    lengths = tuple(len(row) for row in rows)
    starts = itertools.accumulate(lengths, initial=0)
    places = [start + place for start, of_row in zip(starts, selected, strict=False) for place in of_row]
    return Batch(
        tuple(ids),
        lengths,
        tuple(map(len, selected)),
        torch.tensor([token for row in rows for token in row], dtype=torch.long),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor(places, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
    )


def _cells(lengths: Sequence[int], longest: int) -> Tensor:
    """Where each token of rows that follow each other lies among rows side by side `[T]`, on the CPU."""
    return torch.cat([torch.arange(length) + row * longest for row, length in enumerate(lengths)])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory a copy to a GPU does not hold up the host.
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)
