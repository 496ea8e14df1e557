"""Rows side by side, as tensors: what a model reads and whose hidden states are wanted.

B rows, L positions, N response tokens.
"""

# ruff: noqa: N815 (fields carry shape suffixes too)
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side, padded on the right.

    Attributes:
        ids: record ids of the B rows.
        input_ids_BL: prompt, response, padding.
        attention_mask_BL: 1 for prompt and response, 0 for padding.
        position_mask_BL: True where the next token is a response token: the positions whose hidden states count.
        targets_N: the response tokens, in the row-major order of `position_mask_BL`.
    """

    ids: tuple[str, ...]
    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    position_mask_BL: Tensor
    targets_N: Tensor

    @property
    def num_response_tokens(self) -> int:
        return self.targets_N.shape[0]

    @property
    def row_indices(self) -> Tensor:
        """The row (0..B − 1) that each response token belongs to `[N]`."""
        return self.position_mask_BL.nonzero()[:, 0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.ids,
            self.input_ids_BL.to(device),
            self.attention_mask_BL.to(device),
            self.position_mask_BL.to(device),
            self.targets_N.to(device),
        )
