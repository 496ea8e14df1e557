"""Skew forward Kullback-Leibler divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_divergence, log_mixture
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("sfkl")
@dataclass(frozen=True, kw_only=True)
class SkewForwardKL:
    """KL(p ‖ αp + (1 − α)q) per response token, in nats; p teacher, q student. DistiLLM, arXiv 2402.03898, section 3.1.

    `alpha` 0 is forward KL, 1 is 0 everywhere.
    Deviation: the reference of POCL leaves out the teacher's entropy: the same gradient, but not 0 at equality.
    """

    needs_teacher: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, le=1)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        mixture_NV = log_mixture(teacher_logprobs_NV, student_logprobs_NV, self.alpha)
        return kl_divergence(teacher_logprobs_NV, mixture_NV)
