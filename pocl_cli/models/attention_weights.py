"""How a model spreads its attention: read from the weights of its own eager attention, a layer at a time.

B rows, L positions, H heads of a layer, N selected tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_cli.errors import ConfigError
from pocl_cli.models.batch import Batch, PaddedRows


@torch.no_grad()
def attention_variances(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The variance of each selected token's attention weights `[N]`, in float64; the mean over all heads and layers.

    It is taken over the tokens that a causal model shows to it, itself among them: 0 where it attends to all alike, and
    (1 − 1/n)/n where it attends to one of n alone.

    Raises:
        ConfigError: the architecture gives no attention weights.
    """
    rows = batch.padded()
    reader = _Reader(rows)
    with _eager(model), reader.hooked(model):
        model.base_model(input_ids=rows.input_ids_BL, use_cache=False)
    if not reader.num_heads:
        raise ConfigError(
            f"the attention of {type(model).__name__} cannot be read",
            why="its layers give no attention weights",
            fix="choose another difficulty",
        )
    return reader.variance_N / reader.num_heads


class _Reader:
    """Adds up the variances of every layer that gives weights `[B, H, L, L]`, and lets go of the weights."""

    def __init__(self, rows: PaddedRows) -> None:
        self._shape, self._selected_N = rows.input_ids_BL.shape, rows.selected_N
        # float64: the difference of two nearly equal numbers.
        self._visible_N1 = (rows.selected_N % self._shape[1] + 1).double()[:, None]
        self._last: Tensor | None = None
        self.variance_N = torch.zeros_like(rows.selected_N, dtype=torch.float64)
        self.num_heads = 0

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        handles = [module.register_forward_hook(self._read) for module in model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _read(self, module: nn.Module, inputs: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        num_rows, num_positions = self._shape
        # A layer may hand on what its attention gave.
        if not isinstance(weights, Tensor) or weights.ndim != 4 or weights is self._last:
            return
        if (weights.shape[0], *weights.shape[2:]) != (num_rows, num_positions, num_positions):
            return
        self._last = weights
        weights_NHL = weights.transpose(1, 2).flatten(0, 1).index_select(0, self._selected_N).double()
        mean_NH = weights_NHL.sum(dim=-1) / self._visible_N1
        variance_NH = weights_NHL.square().sum(dim=-1) / self._visible_N1 - mean_NH.square()
        self.variance_N += variance_NH.sum(dim=-1)
        self.num_heads += weights.shape[1]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    config: Any = model.config.get_text_config(decoder=True)
    usual = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual
