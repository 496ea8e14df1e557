"""What every KD method is, and the formulas that the methods share. N response tokens, V vocabulary entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# Stands for log 0 where −inf would make gradients NaN; its exponential is 0 in every dtype.
LOG_ZERO = -1e30


class KDMethod(Protocol):
    """A member of the family `kd_methods`: the distillation term per response token, in nats.

    It is given tempered log-probabilities `[N, V]` (float32 or float64, normalised, entries may be -inf) and returns
    `[N]`. Gradients flow to the student's side. Shift, mask, temperature, T² and normalisation belong to the objective.
    """

    needs_teacher: ClassVar[bool]

    @property
    def t_squared(self) -> bool: ...

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor: ...


def kl_divergence(logprobs_NV: Tensor, reference_logprobs_NV: Tensor) -> Tensor:
    """KL(p ‖ r) = Σ p·(log p − log r) per token `[N]`, in nats. Entries with p = 0 add nothing and get no gradient."""
    return kl_terms(logprobs_NV, reference_logprobs_NV).sum(dim=-1)


def kl_terms(logprobs_NV: Tensor, reference_logprobs_NV: Tensor) -> Tensor:
    """The terms p·(log p − log r) of KL(p ‖ r) per entry `[N, V]`; 0 where p = 0."""
    probs_NV = logprobs_NV.exp()
    # Without the mask 0·(−inf − (−inf)) would make the sum and both gradients NaN.
    log_ratio_NV = (logprobs_NV - reference_logprobs_NV).masked_fill(probs_NV == 0, 0.0)
    return probs_NV * log_ratio_NV


def log_mixture(logprobs_NV: Tensor, other_logprobs_NV: Tensor, weight: float) -> Tensor:
    """log(weight·p + (1 − weight)·r) per entry `[N, V]`; exact at weight 0 and 1."""
    if weight == 0:
        return other_logprobs_NV
    if weight == 1:
        return logprobs_NV
    # The gradient of logaddexp(−inf, −inf) is NaN; on one side a finite floor stands for the same probability, 0.
    other_NV = other_logprobs_NV.clamp(min=LOG_ZERO) + math.log1p(-weight)
    return (logprobs_NV + math.log(weight)).logaddexp(other_NV)
