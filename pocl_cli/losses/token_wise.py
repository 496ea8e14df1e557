"""Token-wise distillation: forward or reverse KL for every entry of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_terms
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("todi")
@dataclass(frozen=True, kw_only=True)
class TokenWise:
    """Σ w·p·log(p/q) + (1 − w)·q·log(q/p), w = σ(β·log(p/q)), per response token, in nats; p teacher, q student.

    ToDi, Jung et al. 2025, arXiv 2505.16297: an entry that the student underestimates is weighted as in
    forward KL, one that it overestimates as in reverse KL. The weight counts as a constant: no gradient flows through
    it. `sharpness` is β; the paper's method and code have 1, 0 is half the sum of both divergences.
    At β = 1 w is p/(p + q), and the value is that of KL(p ‖ q) + KL(q ‖ p); the gradient is another.
    """

    needs_teacher: ClassVar[bool] = True
    sharpness: Annotated[float, Field(ge=0)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        # Where both are −inf the difference is NaN; neither term counts there.
        log_ratio_NV = (teacher_logprobs_NV - student_logprobs_NV.detach()).nan_to_num_()
        weight_NV = log_ratio_NV.mul_(self.sharpness).sigmoid_()
        forward_N = (weight_NV * kl_terms(teacher_logprobs_NV, student_logprobs_NV)).sum(dim=-1)
        return forward_N + ((1 - weight_NV) * kl_terms(student_logprobs_NV, teacher_logprobs_NV)).sum(dim=-1)
