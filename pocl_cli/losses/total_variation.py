"""Total variation distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("tvd")
@dataclass(frozen=True, kw_only=True)
class TotalVariation:
    """½ Σ|p − q| per response token, in 0..1; p teacher, q student. f-distill, Wen et al. 2023, arXiv 2307.15190."""

    needs_teacher: ClassVar[bool] = True
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        return (student_logprobs_NV.exp() - teacher_logprobs_NV.exp()).abs().sum(dim=-1) / 2
