"""Weighted sum of both Kullback-Leibler divergences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_divergence
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("symkl")
@dataclass(frozen=True, kw_only=True)
class SymmetricKL:
    """w·KL(p ‖ q) + (1 − w)·KL(q ‖ p) per response token, in nats; p teacher, q student. Jeffreys 1946.

    `forward_weight` is w: 1 is forward KL, 0 reverse KL.
    Deviation: Jeffreys adds both; at w = 0.5 ours is half of that, so that every w gives a mean.
    """

    needs_teacher: ClassVar[bool] = True
    forward_weight: Annotated[float, Field(ge=0, le=1)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        # A term of weight 0 is not computed: it may be infinite, and 0·inf is NaN.
        if self.forward_weight == 0:
            return kl_divergence(student_logprobs_NV, teacher_logprobs_NV)
        forward_N = kl_divergence(teacher_logprobs_NV, student_logprobs_NV)
        if self.forward_weight == 1:
            return forward_N
        reverse_N = kl_divergence(student_logprobs_NV, teacher_logprobs_NV)
        return self.forward_weight * forward_N + (1 - self.forward_weight) * reverse_N
