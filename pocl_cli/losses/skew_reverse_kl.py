"""Skew reverse Kullback-Leibler divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_divergence, log_mixture
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("srkl")
@dataclass(frozen=True, kw_only=True)
class SkewReverseKL:
    """KL(q ‖ (1 − α)p + αq) per response token, in nats; p teacher, q student. DistiLLM, arXiv 2402.03898, section 3.1.

    `alpha` 0 is reverse KL, 1 is 0 everywhere.
    """

    needs_teacher: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, le=1)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        mixture_NV = log_mixture(student_logprobs_NV, teacher_logprobs_NV, self.alpha)
        return kl_divergence(student_logprobs_NV, mixture_NV)
