"""A key-value cache of fixed places: a row enters a free slot, is decoded there, and leaves it to the next one.

Memory is taken once. A step writes one column a row and reads a view; nothing is padded on the left, shifted or
joined, however the rows come and go.

Shapes: S slots, R rows in the first of them, H key heads, C columns (tokens of a row), E size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from pocl_cli.log import get_logger
from pocl_cli.models.head import HeadedModel, rounding_tolerance


@dataclass(slots=True)
class _Step:
    """Where the rows of a step write, and how much they read; one value that all layers share."""

    rows_R: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    lengths_R: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    num_columns: int = 0


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer, [S, H, C, E]. A forward pass brings one new token a row."""

    def __init__(self, keys: Tensor, values: Tensor, step: _Step) -> None:
        super().__init__()
        self.keys, self.values, self._step = keys, values, step
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes each row's token in the row's own column; returns what there is of the step's rows, [R, H, C, E]."""
        step, num_rows = self._step, len(key_states)
        self.keys[step.rows_R, :, step.lengths_R] = key_states[:, :, 0]
        self.values[step.rows_R, :, step.lengths_R] = value_states[:, :, 0]
        return self.keys[:num_rows, :, : step.num_columns], self.values[:num_rows, :, : step.num_columns]

    def get_seq_length(self) -> int:
        """Columns before the step's: its mask and its positions are given, so no row's own length is asked for."""
        return self._step.num_columns - 1


class SlotCache:
    """Up to `num_slots` rows of up to `capacity` tokens. The rows are in the first slots, without a gap.

    Attributes:
        lengths: number of cached tokens of each row.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.lengths: list[int] = []
        self._step = _Step()
        self._cache: Cache | None = None

    def enter(self, read: Cache, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """New rows, after those that are there: row i is the first lengths[i] columns of row sources[i] of `read`."""
        start, longest = len(self.lengths), max(lengths)
        stop = start + len(sources)
        assert stop <= self.num_slots, "more rows than slots"
        layers: list[Any] = list(read.layers)
        if self._cache is None:
            self._cache = Cache(layers=[self._empty_layer(layer) for layer in layers])
        index = torch.tensor(sources, device=layers[0].keys.device)
        for mine, theirs in zip(self._layers, layers, strict=True):
            # Columns beyond a row's length hold other tokens' numbers: finite, and masked until they are written over.
            mine.keys[start:stop, :, :longest] = theirs.keys[:, :, :longest].index_select(0, index)
            mine.values[start:stop, :, :longest] = theirs.values[:, :, :longest].index_select(0, index)
        self.lengths += lengths

    def leave(self, slot: int) -> None:
        """Takes out the row in `slot`; the last row moves there."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if slot == last:
            return
        self.lengths[slot] = length
        for layer in self._layers:
            layer.keys[slot, :, :length] = layer.keys[last, :, :length]
            layer.values[slot, :, :length] = layer.values[last, :, :length]

    def step(self, headed: HeadedModel, tokens: Sequence[int]) -> Tensor:
        """Reads one more token a row; returns the final hidden states, from which the next ones come, [R, D]."""
        assert self._cache is not None, "no row has entered"
        device = self._layers[0].keys.device
        lengths_R = torch.tensor(self.lengths, device=device)
        self._step.rows_R = torch.arange(len(tokens), device=device)
        self._step.lengths_R = lengths_R
        self._step.num_columns = max(self.lengths) + 1
        mask_RC = torch.arange(self._step.num_columns, device=device) <= lengths_R[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        return headed.next_states(
            torch.tensor(tokens, device=device)[:, None], mask_RC[:, None, None], lengths_R[:, None], self._cache
        )

    @property
    def _layers(self) -> list[Any]:
        assert self._cache is not None, "no row has entered"
        return list(self._cache.layers)

    def _empty_layer(self, like: Any) -> _SlotLayer:
        """Zeros, not what happens to lie in memory: a masked column counts 0 times its values, which must be finite."""
        keys, values = (
            torch.zeros(self.num_slots, one.shape[1], self.capacity, one.shape[3], dtype=one.dtype, device=one.device)
            for one in (like.keys, like.values)
        )
        return _SlotLayer(keys, values, self._step)


@torch.no_grad()
def decodes_in_slots(headed: HeadedModel) -> bool:
    """Whether the model can be decoded with a `SlotCache`: a column's place in the cache must mean nothing to it.

    Not so for sliding windows, recurrent states, and architectures that derive more than visibility from the mask. The
    last word has a comparison with the model's own hidden states.
    """
    model = headed.model
    config = model.config.get_text_config(decoder=True)
    backbone = model.base_model
    if not {"position_ids", "past_key_values"} <= set(inspect.signature(backbone.forward).parameters):
        return False
    if not model._supports_attention_backend or config._attn_implementation != "sdpa":
        return False
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return False
    return _agrees(headed)


def _agrees(headed: HeadedModel) -> bool:
    """Decodes the last token of two short rows of different length, and compares with a pass without a cache."""
    device = headed.model.device
    embedding = headed.model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    input_ids_BL = (torch.arange(12, device=device) * 7919 % embedding.shape[0]).view(2, 6)
    lengths = [5, 3]  # of what is read beforehand
    columns_L = torch.arange(6, device=device)
    lengths_B1 = torch.tensor(lengths, device=device)[:, None]
    last_BL = columns_L == lengths_B1
    expected_BD = headed.hidden_states(input_ids_BL, (columns_L <= lengths_B1).long(), last_BL)
    read = DynamicCache(config=headed.model.config.get_text_config(decoder=True))
    headed.hidden_states(input_ids_BL, (columns_L < lengths_B1).long(), last_BL, cache=read)
    slots = SlotCache(num_slots=2, capacity=6)
    slots.enter(read, [0, 1], lengths)
    found_BD = slots.step(headed, input_ids_BL[last_BL].tolist())
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else expected_BD.dtype
    agrees = (found_BD - expected_BD).abs().max() <= rounding_tolerance(dtype) * expected_BD.abs().max()
    if not agrees:
        get_logger().warning(
            "%s: decoding in slots gives other hidden states than the model alone; a slower way of decoding is taken",
            type(headed.model).__name__,
        )
    return bool(agrees)
