"""A causal language model in two halves: a backbone that gives hidden states, and an output head that gives logits.

Most positions of a batch need no logits; with the halves apart, the head runs on the response tokens alone, in chunks.

B rows, L positions, N selected positions, D hidden size, V rows of the output layer (padding rows included).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from pocl_cli.log import get_logger

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
        logits_nV: Tensor = hidden_nD if self.projection is None else self.projection(hidden_nD)
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

    def __init__(self, model: PreTrainedModel, head: OutputHead, hidden_size: int) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.hidden_size = hidden_size

    @property
    def num_logits(self) -> int:
        """V, the width of the logits before they are cut to the tokenizer's size."""
        return self.head.num_logits

    def hidden_states(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor | None,
        position_mask_BL: Tensor,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """The final hidden states of the selected positions `[N, D]`, in row-major order.

        Args:
            input_ids_BL: token ids.
            attention_mask_BL: 1 for tokens, 0 for padding on either side; None where every position is a token.
            position_mask_BL: True for the positions wanted.
            cache: an empty cache, which then holds the keys and values of all positions.
        """
        inputs = _inputs(self._states_module, input_ids_BL, attention_mask_BL)
        if cache is not None:
            inputs |= {"use_cache": True, "past_key_values": cache}
        return self._all_states(inputs)[position_mask_BL]

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
        inputs: dict[str, object] = {"input_ids": input_ids_R1, "attention_mask": attention_mask_R11C}
        inputs |= {"position_ids": position_ids_R1, "past_key_values": cache, "use_cache": True}
        return self._all_states(inputs)[:, -1]

    @property
    def _states_module(self) -> nn.Module:
        """What gives the hidden states: the backbone, or the whole model where its logits take their place."""
        return self.model if self.head.projection is None else self.model.base_model

    def _all_states(self, inputs: dict[str, object]) -> Tensor:
        outputs = self._states_module(**inputs)
        states_BLD: Tensor = outputs.logits if self.head.projection is None else outputs.last_hidden_state
        return states_BLD


def split_model(model: PreTrainedModel) -> HeadedModel:
    """Takes `model` apart, and falls back to its full logits, with a warning, where that would change them.

    The head is compared with the model's own logits on a small batch, so call this before the model is sharded.
    """
    with torch.no_grad(), _evaluation_mode(model):
        input_ids_BL, attention_mask_BL = _probe_batch(model)
        selected_BL = attention_mask_BL.bool()
        logits_NV = model(**_inputs(model, input_ids_BL, attention_mask_BL)).logits[selected_BL]
        candidates = list(_candidate_heads(model, logits_NV.shape[-1]))
        if candidates:
            hidden_ND = _backbone_states(model, input_ids_BL, attention_mask_BL, selected_BL)
            head = _best_match(candidates, hidden_ND, logits_NV)
            if head is not None:
                return HeadedModel(model, head, hidden_ND.shape[-1])
    get_logger().warning(
        "%s: no output head reproduces the model's own logits; the logits of every position are computed instead, "
        "which needs more memory and time",
        type(model).__name__,
    )
    return HeadedModel(model, OutputHead(None, logits_NV.shape[-1]), logits_NV.shape[-1])


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Largest difference that rounding explains in a model of this dtype, as a fraction of the largest number."""
    return _TOLERANCE[dtype]


def _best_match(candidates: list[OutputHead], hidden_ND: Tensor, logits_NV: Tensor) -> OutputHead | None:
    # A cap or factor near 1 may pass as rounding: the closest candidate wins, not the first that is close enough.
    differences = [_largest_difference(candidate(hidden_ND), logits_NV) for candidate in candidates]
    best = min(range(len(candidates)), key=differences.__getitem__)
    tolerance = rounding_tolerance(logits_NV.dtype) * logits_NV.abs().max().item()
    return candidates[best] if differences[best] <= tolerance else None


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


def _backbone_states(
    model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor | None, position_mask_BL: Tensor
) -> Tensor:
    backbone = model.base_model
    hidden_BLD: Tensor = backbone(**_inputs(backbone, input_ids_BL, attention_mask_BL)).last_hidden_state
    return hidden_BLD[position_mask_BL]


def _inputs(module: nn.Module, input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> dict[str, object]:
    inputs: dict[str, object] = {"input_ids": input_ids_BL, "attention_mask": attention_mask_BL, "use_cache": False}
    # GPT-2 counts padding on the left as positions unless it is told otherwise.
    if attention_mask_BL is not None and "position_ids" in inspect.signature(module.forward).parameters:
        inputs["position_ids"] = (attention_mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
    return inputs


def _probe_batch(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Two rows of ids spread over the vocabulary, the second padded on the right."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    input_ids_BL = (torch.arange(16, device=model.device) * 7919 % embedding.shape[0]).view(2, 8)
    attention_mask_BL = torch.ones_like(input_ids_BL)
    attention_mask_BL[1, 5:] = 0
    return input_ids_BL, attention_mask_BL


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
