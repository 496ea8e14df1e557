"""Generalised Jensen-Shannon divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_divergence, log_mixture
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("jsd")
@dataclass(frozen=True, kw_only=True)
class JensenShannon:
    """β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = βp + (1 − β)q, per response token, in nats; p teacher, q student.

    Generalised JSD of GKD, arXiv 2306.13649, section 2. `teacher_weight` is β: the teacher's share of m and the weight
    of the teacher's own term. It is 0 everywhere at β = 0 and β = 1.
    """

    needs_teacher: ClassVar[bool] = True
    teacher_weight: Annotated[float, Field(ge=0, le=1)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        mixture_NV = log_mixture(teacher_logprobs_NV, student_logprobs_NV, self.teacher_weight)
        divergence_N = (1 - self.teacher_weight) * kl_divergence(student_logprobs_NV, mixture_NV)
        if self.teacher_weight == 0:  # the teacher's term may be infinite here, and 0·inf is NaN
            return divergence_N
        return divergence_N + self.teacher_weight * kl_divergence(teacher_logprobs_NV, mixture_NV)
