"""A key-value cache of fixed places: a row enters a free slot, is decoded there, and leaves it to the next one.

Memory is taken once. A step writes one column a row and reads a view; nothing is padded on the left, shifted or
joined, however the rows come and go.

Shapes: S slots, R rows in the first of them, H key heads, C columns (tokens of a row), E size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pocl_cli.log import get_logger
from pocl_cli.models.batch import make_batch
from pocl_cli.models.head import HeadedModel, rounding_tolerance

# Rows that attend together on the CPU, to the columns of the longest of them. Elsewhere calls cost more than columns.
_ROWS_TOGETHER = 16


@dataclass(frozen=True)
class _Step:
    """Where the rows of a step write, and what they read; one value that all layers share."""

    lengths_R: Tensor  # noqa: N815 (fields carry shape suffixes too)
    num_columns: int
    groups: tuple[tuple[slice, int], ...]  # rows that attend together, and their columns


def _new_step(lengths: Sequence[int], device: torch.device) -> _Step:
    """The step after `lengths` cached tokens a row."""
    together = _ROWS_TOGETHER if device.type == "cpu" else len(lengths)
    starts = range(0, len(lengths), together)
    groups = [(slice(start, start + together), max(lengths[start : start + together]) + 1) for start in starts]
    return _Step(torch.tensor(lengths, device=device), max(lengths) + 1, tuple(groups))


_step: ContextVar[_Step] = ContextVar("step")
_ATTENTION = "pocl_slots"


def _attend_in_groups(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """The models' own attention, for a few rows at a time, so that short rows do not read the columns of long ones."""
    outputs = []
    for rows, columns in _step.get().groups:
        seen = (key[rows, :, :columns], value[rows, :, :columns], attention_mask[rows, ..., :columns])
        outputs.append(sdpa_attention_forward(module, query[rows], *seen, **options)[0])
    return torch.cat(outputs), None


AttentionInterface.register(_ATTENTION, _attend_in_groups)


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer, [S, H, C, E]. A forward pass brings one new token a row."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes each row's token in the row's own column; returns what there is of the step's rows, [R, H, C, E]."""
        assert self.keys is not None, "a layer is made with its memory"
        assert self.values is not None, "a layer is made with its memory"
        step, num_rows = _step.get(), len(key_states)
        rows_R = torch.arange(num_rows, device=self.device)
        self.keys[rows_R, :, step.lengths_R] = key_states[:, :, 0]
        self.values[rows_R, :, step.lengths_R] = value_states[:, :, 0]
        return self.keys[:num_rows, :, : step.num_columns], self.values[:num_rows, :, : step.num_columns]

    def get_seq_length(self) -> int:
        """Columns before the step's: its mask and its positions are given, so no row's own length is asked for."""
        return _step.get().num_columns - 1


class SlotCache:
    """Up to `num_slots` rows of up to `capacity` tokens. The rows are in the first slots, without a gap.

    Attributes:
        lengths: number of cached tokens of each row.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.lengths: list[int] = []
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
        step = _new_step(self.lengths, device)
        mask_RC = torch.arange(step.num_columns, device=device) <= step.lengths_R[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        config = headed.model.config.get_text_config(decoder=True)
        usual = config._attn_implementation
        token = _step.set(step)
        config._attn_implementation = _ATTENTION
        try:
            return headed.next_states(
                torch.tensor(tokens, device=device)[:, None],
                mask_RC[:, None, None],
                step.lengths_R[:, None],
                self._cache,
            )
        finally:
            config._attn_implementation = usual
            _step.reset(token)

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
        return _SlotLayer(keys, values)


@torch.no_grad()
def bytes_per_slot_token(headed: HeadedModel) -> int | None:
    """Memory of a cached token, or None where the model cannot be decoded with a `SlotCache`.

    A column's place in the cache must mean nothing to the model. It does for sliding windows, recurrent states, and
    architectures that derive more than visibility from the mask. The last word has a comparison with the model's own
    hidden states.
    """
    model = headed.model
    config = model.config.get_text_config(decoder=True)
    if not {"position_ids", "past_key_values"} <= set(inspect.signature(model.base_model.forward).parameters):
        return None
    if not model._supports_attention_backend or config._attn_implementation != "sdpa":
        return None
    read = DynamicCache(config=config)
    if not read.layers or any(type(layer) is not DynamicLayer for layer in read.layers):
        return None
    if not _agrees(headed, read):
        get_logger().warning(
            "%s: decoding in slots gives other hidden states than the model alone; a slower way of decoding is taken",
            type(model).__name__,
        )
        return None
    layers: list[Any] = list(read.layers)
    tensors: list[Tensor] = [one for layer in layers for one in (layer.keys, layer.values)]
    return sum(one[0, :, 0].numel() * one.element_size() for one in tensors)


def _agrees(headed: HeadedModel, read: DynamicCache) -> bool:
    """Decodes the last token of two short rows of different length, and compares with a pass without a cache."""
    device = headed.model.device
    embedding = headed.model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    tokens = (torch.arange(12) * 7919 % embedding.shape[0]).tolist()
    rows = [tokens[:6], tokens[6:10]]

    def last_states(rows: Sequence[Sequence[int]], cache: Cache | None = None) -> Tensor:
        batch = make_batch("ab", rows, [range(len(row) - 1, len(row)) for row in rows], [])
        return headed.hidden_states(batch.to(device), cache)

    expected_BD = last_states(rows)
    last_states([row[:-1] for row in rows], read)
    slots = SlotCache(num_slots=2, capacity=6)
    slots.enter(read, [0, 1], [len(row) - 1 for row in rows])
    found_BD = slots.step(headed, [row[-1] for row in rows])
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else expected_BD.dtype
    return bool((found_BD - expected_BD).abs().max() <= rounding_tolerance(dtype) * expected_BD.abs().max())
