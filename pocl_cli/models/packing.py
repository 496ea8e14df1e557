"""Several rows in one sequence, without a token of padding: every layer but attention works on tokens anyway.

Attention is replaced for the length of one forward pass by a function that works row by row, so that no row sees
another. Whether an architecture keeps its rows apart that way, only its hidden states tell (`keeps_rows_apart`).

T tokens of all rows, H heads, K key-value heads, d head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pocl_cli.models.batch import Batch

_NAME = "pocl_row_by_row"
_LENGTHS: ContextVar[tuple[int, ...]] = ContextVar("lengths of the rows of the sequence")

# What models hand to attention besides tensors, and what has no bearing on rows of full causal attention.
_HARMLESS = frozenset({"position_ids", "is_causal", "output_attentions", "use_cache", "cache_position"})


class NotPackableError(Exception):
    """The architecture asks attention for something that working row by row does not give."""


def packed_hidden_states(backbone: nn.Module, batch: Batch) -> Tensor:
    """The final hidden states of the batch's selected tokens `[N, D]`."""
    with _row_by_row(backbone, batch.lengths):
        hidden_1TD: Tensor = backbone(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
        ).last_hidden_state
    return hidden_1TD[0].index_select(0, batch.selected_N)


def keeps_rows_apart(backbone: nn.Module, probe: Batch, expected_ND: Tensor, tolerance: float) -> bool:
    """Whether the probe's rows in one sequence have the hidden states that they have side by side.

    An architecture with sliding windows, a recurrent state, positions of its own counting, or attention that is not
    exchangeable has others, or says so by what it asks of attention.
    """
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return False
    try:
        hidden_ND = packed_hidden_states(backbone, probe)
    except NotPackableError:
        return False
    return bool((hidden_ND.double() - expected_ND.double()).abs().max().item() <= tolerance)


@contextmanager
def _row_by_row(model: nn.Module, lengths: tuple[int, ...]) -> Iterator[None]:
    config: Any = model.config
    before, token = config._attn_implementation, _LENGTHS.set(lengths)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _LENGTHS.reset(token)


def _attend(
    module: nn.Module,
    query_1HTd: Tensor,
    key_1KTd: Tensor,
    value_1KTd: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row, as transformers' attention functions are called; output `[1, T, H, d]`."""
    unknown = [name for name, value in more.items() if value is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None or getattr(module, "is_causal", True) is False:
        raise NotPackableError(f"{type(module).__name__} asks for {', '.join(unknown) or 'more than causal attention'}")
    repeats = query_1HTd.shape[1] // key_1KTd.shape[1]
    if repeats > 1:
        key_1KTd, value_1KTd = (x.repeat_interleave(repeats, dim=1) for x in (key_1KTd, value_1KTd))
    rows = zip(*(x.split(_LENGTHS.get(), dim=2) for x in (query_1HTd, key_1KTd, value_1KTd)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
        for query, key, value in rows
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)
