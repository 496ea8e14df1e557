"""Causal attention of rows that follow each other in one sequence, or lie side by side with padding on the right.

For the length of one forward pass it takes the place of a model's own attention. All other layers of a transformer work
token by token, so rows in one sequence need no padding; and neither layout needs a mask, for which transformers would
read values back from the device. Whether an architecture allows for it, its hidden states tell (`is_exchangeable`).

B rows, L positions, T tokens of all rows, H heads, K key-value heads, d head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache, PreTrainedModel

from pocl_cli.models.batch import Batch, PaddedRows

_NAME = "pocl_causal"
_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("rows in one sequence; None: side by side", default=None)

# What models hand to attention besides tensors that has no bearing on full causal attention.
_HARMLESS = frozenset({"position_ids", "is_causal", "output_attentions", "use_cache", "cache_position"})


class OtherAttentionError(Exception):
    """The architecture asks attention for more than causal rows."""


def packed_hidden_states(backbone: nn.Module, batch: Batch) -> Tensor:
    """The final hidden states of the batch's selected tokens `[N, D]`, from rows in one sequence."""
    with _attention(backbone, _NAME, batch.lengths):
        hidden_1TD: Tensor = backbone(
            input_ids=batch.input_ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False
        ).last_hidden_state
    return hidden_1TD[0].index_select(0, batch.selected_N)


def padded_hidden_states(backbone: nn.Module, rows: PaddedRows, cache: Cache | None = None) -> Tensor:
    """The same from rows side by side; an empty `cache` then holds their keys and values."""
    with _attention(backbone, _NAME, None):
        hidden_BLD: Tensor = backbone(
            input_ids=rows.input_ids_BL, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
    return hidden_BLD.flatten(0, 1).index_select(0, rows.selected_N)


def is_exchangeable(backbone: nn.Module, probe: Batch, expected_ND: Tensor, tolerance: float) -> bool:
    """Whether the probe's rows, in either layout, have the hidden states that the model's own attention gives.

    An architecture with sliding windows, a recurrent state, positions of its own counting or caps on attention scores
    has others, or says so by what it asks of attention.
    """
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return False
    try:
        found = packed_hidden_states(backbone, probe), padded_hidden_states(backbone, probe.padded())
    except OtherAttentionError:
        return False
    return all((one.double() - expected_ND.double()).abs().max().item() <= tolerance for one in found)


def recompute_layers(model: PreTrainedModel) -> None:
    """Switches gradient checkpointing on: layers run again in the backward pass, with the attention that they had.

    Without that, a layer would find the model's own attention in its place when it runs again.
    """
    config: Any = model.config

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _attention(model, config._attn_implementation, _LENGTHS.get())

    # The newer name of the same switch, where this transformers has it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


@contextmanager
def _attention(model: nn.Module, name: str, lengths: tuple[int, ...] | None) -> Iterator[None]:
    config: Any = model.config
    before, token = config._attn_implementation, _LENGTHS.set(lengths)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        _LENGTHS.reset(token)


def _attend(
    module: nn.Module,
    query_BHLd: Tensor,
    key_BKLd: Tensor,
    value_BKLd: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers calls its attention functions; output `[B, L, H, d]`."""
    unknown = [name for name, value in more.items() if value is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None or getattr(module, "is_causal", True) is False:
        raise OtherAttentionError(f"{type(module).__name__} asks for {', '.join(unknown) or 'a mask'}")
    repeats = query_BHLd.shape[1] // key_BKLd.shape[1]
    if repeats > 1:
        key_BKLd, value_BKLd = (x.repeat_interleave(repeats, dim=1) for x in (key_BKLd, value_BKLd))
    lengths = _LENGTHS.get() or (query_BHLd.shape[2],)
    rows = zip(*(x.split(lengths, dim=2) for x in (query_BHLd, key_BKLd, value_BKLd)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
        for query, key, value in rows
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2), None


AttentionInterface.register(_NAME, _attend)
