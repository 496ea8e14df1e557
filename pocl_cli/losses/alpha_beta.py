"""α-β divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import LOG_ZERO
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("abkd")
@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """Σ [α·p^(α+β) + β·q^(α+β) − (α+β)·p^α·q^β] / (α·β·(α+β)) per response token; p teacher, q student.

    ABKD, Wang et al. 2025, arXiv 2505.04560, with the divergence of Cichocki et al. 2011. The formula is 0/0 at α = 0
    and at β = 0, where its limit is computed: (1, 0) is forward KL, (0, 1) reverse KL. (½, ½) is 2·Σ(√p − √q)², four
    times the squared Hellinger distance; (1, 1) is ½ Σ(p − q)².
    Deviation: negative α or β, where an entry of vanishing probability decides the value, and α = β = 0 are refused.
    """

    needs_teacher: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    t_squared: bool

    def __post_init__(self) -> None:
        if self.alpha + self.beta == 0:
            raise ValueError("alpha and beta are both 0; one of them must be above (1 and 0 is forward KL)")

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        log_p_NV, log_q_NV = teacher_logprobs_NV.clamp(min=LOG_ZERO), student_logprobs_NV.clamp(min=LOG_ZERO)
        of_teacher_NV, of_student_NV = self._differences(log_p_NV, log_q_NV.detach())
        value_N = (of_teacher_NV - of_student_NV).sum(dim=-1) / (self.alpha + self.beta)
        # The derivative by log q is the student's difference, sign reversed. Written so, and not left to autograd, it
        # keeps one tensor for the backward pass instead of ten.
        return value_N - (of_student_NV * (log_q_NV - log_q_NV.detach())).sum(dim=-1)

    def _differences(self, log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(p^(α+β) − p^α·q^β) / β and (p^α·q^β − q^(α+β)) / α per entry `[N, V]`, or their limits.

        Each is its larger term times 1 − e^(−…): it neither overflows nor loses its digits where p and q are close.
        """
        order, log_product_NV = self.alpha + self.beta, self.alpha * log_p_NV + self.beta * log_q_NV
        gap_NV = log_p_NV - log_q_NV
        sign_NV, distance_NV = gap_NV.sign(), gap_NV.abs_()
        of_teacher_NV = (order * log_p_NV).maximum(log_product_NV).exp_().mul_(_saturating(distance_NV, self.beta))
        of_student_NV = (order * log_q_NV).maximum(log_product_NV).exp_().mul_(_saturating(distance_NV, self.alpha))
        return of_teacher_NV.mul_(sign_NV), of_student_NV.mul_(sign_NV)


def _saturating(distance_NV: Tensor, rate: float) -> Tensor:
    """(1 − e^(−rate·distance)) / rate, and its limit, the distance itself, at rate 0."""
    return distance_NV if rate == 0 else (distance_NV * -rate).expm1() / -rate
