"""Forward Kullback-Leibler divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pocl_cli.losses.divergence import kl_divergence
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("fkl")
@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL(p ‖ q) per response token, in nats; p teacher, q student. Hinton et al. 2015, arXiv 1503.02531.

    Deviation: the reference of POCL computes the cross entropy −Σ p·log q: the same gradient, but not 0 at equality.
    """

    needs_teacher: ClassVar[bool] = True
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        return kl_divergence(teacher_logprobs_NV, student_logprobs_NV)
