"""Supervised fine-tuning: no distillation term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("sft")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross entropy with the gold tokens alone, whatever the curriculum's `kd_ratio`; there is no teacher."""

    needs_teacher: ClassVar[bool] = False
    t_squared: ClassVar[bool] = False

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        raise AssertionError("sft has no distillation term: the objective must not ask for it")
