"""A causal language model in two halves: a backbone that gives hidden states, and an output head that gives logits.

Most positions of a batch need no logits; with the halves apart, the head runs on the response tokens alone, in chunks.

N selected tokens, D hidden size, V rows of the output layer (padding rows included).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from pocl_cli.log import get_logger
from pocl_cli.models import attention
from pocl_cli.models.batch import Batch, PaddedRows, make_batch

# Names under which architectures keep the factor on their logits and the cap on them. Whether a model uses what its
# configuration names, and which way round, only the comparison with its own logits tells.
_SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFT_CAP_NAMES = ("final_logit_softcapping", "logits_soft_cap")

# Largest difference that rounding explains, as a fraction of the largest logit.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class OutputHead(nn.Module):
    """Hidden states `[n, D]` → logits `[n, V]`, in the model's dtype.

    Args:
        projection: the model's own output layer, so that a tied weight stays tied; None where hidden states are logits.
        num_logits: V.
        multiplier: factor on the projection (Cohere, Falcon-H1).
        divisor: divides the projection (Granite).
        soft_cap: c of c·tanh(logits / c) (Gemma 2); None is no cap.
    """

    def __init__(
        self,
        projection: nn.Module | None,
        num_logits: int,
        *,
        multiplier: float = 1.0,
        divisor: float = 1.0,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.num_logits = num_logits
        self.multiplier, self.divisor, self.soft_cap = multiplier, divisor, soft_cap

    def forward(self, hidden_nD: Tensor) -> Tensor:
        return self.shape_logits(self.project(hidden_nD))

    def project(self, hidden_nD: Tensor) -> Tensor:
        """The output layer alone `[n, V]`."""
        return hidden_nD if self.projection is None else self.projection(hidden_nD)

    def shape_logits(self, logits_nV: Tensor) -> Tensor:
        """What is done to each projected value: factors and cap. The same tensor where there is none."""
        if self.multiplier != 1:
            logits_nV = logits_nV * self.multiplier
        if self.divisor != 1:
            logits_nV = logits_nV / self.divisor
        if self.soft_cap is not None:
            logits_nV = torch.tanh(logits_nV / self.soft_cap) * self.soft_cap
        return logits_nV

    def extra_repr(self) -> str:
        return f"multiplier={self.multiplier}, divisor={self.divisor}, soft_cap={self.soft_cap}"


class HeadedModel(nn.Module):
    """A causal language model with its two halves apart; the parameters are the model's own.

    Attributes:
        model: the whole model.
        head: hidden states → logits; the identity over the model's logits where no head reproduces them.
        hidden_size: D, the width of what `hidden_states` returns.
    """

    def __init__(self, model: PreTrainedModel, head: OutputHead, hidden_size: int, *, causal: bool = False) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.hidden_size = hidden_size
        self._causal = causal

    @property
    def num_logits(self) -> int:
        """V, the width of the logits before they are cut to the tokenizer's size."""
        return self.head.num_logits

    @property
    def packs(self) -> bool:
        """Whether rows are put one after another instead of side by side with padding.

        On the CPU, where the architecture allows for it: elsewhere, attention row by row would be many small kernels.
        """
        return self._causal and self.model.device.type == "cpu"

    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The final hidden states that predict the response tokens `[N, D]`, row after row.

        Args:
            batch: the rows.
            cache: an empty cache, which then holds the keys and values of every row from column 0 on.
        """
        if self.packs and cache is None:
            return attention.packed_hidden_states(self.model.base_model, batch)
        return self.padded_hidden_states(batch.padded(), cache)

    def padded_hidden_states(self, rows: PaddedRows, cache: Cache | None = None) -> Tensor:
        """The same from rows side by side."""
        if self._causal:
            return attention.padded_hidden_states(self.model.base_model, rows, cache)
        return _select(self._states_module, self._states_name, rows, cache)

    def next_states(
        self, input_ids_R1: Tensor, attention_mask_R11C: Tensor, position_ids_R1: Tensor, cache: Cache
    ) -> Tensor:
        """The final hidden states `[R, D]` of one more token a row, after those in `cache`, which takes the token in.

        Args:
            input_ids_R1: the tokens.
            attention_mask_R11C: True for the columns of the cache that a row sees, its new token's included.
            position_ids_R1: the tokens' positions in their rows.
            cache: keys and values of the rows' earlier tokens.
        """
        outputs = self._states_module(
            input_ids=input_ids_R1,
            attention_mask=attention_mask_R11C,
            position_ids=position_ids_R1,
            past_key_values=cache,
            use_cache=True,
        )
        states_R1D: Tensor = getattr(outputs, self._states_name)
        return states_R1D[:, -1]

    @property
    def _states_module(self) -> nn.Module:
        """What gives the hidden states: the backbone, or the whole model where its logits take their place."""
        return self.model if self.head.projection is None else self.model.base_model

    @property
    def _states_name(self) -> str:
        return "logits" if self.head.projection is None else "last_hidden_state"


def split_model(model: PreTrainedModel) -> HeadedModel:
    """Takes `model` apart, and falls back to its full logits, with a warning, where that would change them.

    The head is compared with the model's own logits on a small batch, so call this before the model is sharded.
    """
    # GPT-2 would read the token ids back from the device, and warn that a mask is missing.
    model.base_model.warn_if_padding_and_no_attention_mask = _no_mask_is_needed  # type: ignore[assignment]
    with torch.no_grad(), _evaluation_mode(model):
        probe = _probe_batch(model)
        logits_NV = _select(model, "logits", probe.padded())
        candidates = list(_candidate_heads(model, logits_NV.shape[-1]))
        if candidates:
            hidden_ND = _select(model.base_model, "last_hidden_state", probe.padded())
            head = _best_match(candidates, hidden_ND, logits_NV)
            if head is not None:
                causal = attention.is_exchangeable(model.base_model, probe, hidden_ND, _tolerance(hidden_ND))
                return HeadedModel(model, head, hidden_ND.shape[-1], causal=causal)
    get_logger().warning(
        "%s: no output head reproduces the model's own logits; the logits of every position are computed instead, "
        "which needs more memory and time",
        type(model).__name__,
    )
    return HeadedModel(model, OutputHead(None, logits_NV.shape[-1]), logits_NV.shape[-1])


def _best_match(candidates: list[OutputHead], hidden_ND: Tensor, logits_NV: Tensor) -> OutputHead | None:
    # A cap or factor near 1 may pass as rounding: the closest candidate wins, not the first that is close enough.
    differences = [_largest_difference(candidate(hidden_ND), logits_NV) for candidate in candidates]
    best = min(range(len(candidates)), key=differences.__getitem__)
    return candidates[best] if differences[best] <= _tolerance(logits_NV) else None


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Largest difference that rounding explains in a model of this dtype, as a fraction of the largest number."""
    return _TOLERANCE[dtype]


def _tolerance(expected: Tensor) -> float:
    return rounding_tolerance(expected.dtype) * expected.abs().max().item()


def _largest_difference(logits_NV: Tensor, expected_NV: Tensor) -> float:
    if logits_NV.shape != expected_NV.shape:
        return float("inf")
    return (logits_NV.cpu().double() - expected_NV.cpu().double()).abs().max().item()


def _candidate_heads(model: PreTrainedModel, num_logits: int) -> Iterator[OutputHead]:
    """Every head that the names in the configuration allow for; none where the model cannot be taken apart."""
    projection = model.get_output_embeddings()
    if projection is None or model.base_model is model:
        return
    config = model.config.get_text_config()
    scales: list[dict[str, float]] = [{}]
    for name in _SCALE_NAMES:
        if value := getattr(config, name, None):
            scales += [{"multiplier": value}, {"divisor": value}]
    soft_caps = [None, *(cap for name in _SOFT_CAP_NAMES if (cap := getattr(config, name, None)))]
    for scale in scales:
        for soft_cap in soft_caps:
            yield OutputHead(projection, num_logits, **scale, soft_cap=soft_cap)


def _select(module: nn.Module, output: str, rows: PaddedRows, cache: Cache | None = None) -> Tensor:
    """One output of the selected positions `[N, …]`."""
    arguments: dict[str, object] = {"input_ids": rows.input_ids_BL, "use_cache": cache is not None}
    if cache is not None:
        arguments["past_key_values"] = cache
    values_BLX: Tensor = getattr(module(**arguments), output)
    return values_BLX.flatten(0, 1).index_select(0, rows.selected_N)


def _probe_batch(model: PreTrainedModel) -> Batch:
    """Three rows of ids spread over the vocabulary, every position selected."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    ids = iter((torch.arange(18) * 7919 % embedding.shape[0]).tolist())
    rows = [[next(ids) for _ in range(length)] for length in (8, 3, 7)]
    return make_batch("abc", rows, [range(len(row)) for row in rows], []).to(model.device)


def _no_mask_is_needed(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Stands in for a warning of transformers: padding, where there is any, is on the right."""


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while; each submodule gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
