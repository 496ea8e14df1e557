"""Reverse Kullback-Leibler divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pocl_cli.losses.divergence import kl_divergence
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("rkl")
@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """KL(q ‖ p) per response token, in nats; p teacher, q student. MiniLLM, arXiv 2306.08543.

    Deviation: on the tokens of the training rows, where MiniLLM samples the student's own.
    """

    needs_teacher: ClassVar[bool] = True
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        return kl_divergence(student_logprobs_NV, teacher_logprobs_NV)
