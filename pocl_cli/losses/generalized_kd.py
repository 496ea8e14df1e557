"""Generalised knowledge distillation: any divergence, on the rows or on the student's own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses import evolving
from pocl_cli.losses.composition import AroundBase
from pocl_cli.losses.on_policy import Part, StudentAnswers
from pocl_cli.registry import kd_methods
from pocl_cli.seeds import derive_fraction

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.divergence import KDMethod
    from pocl_cli.losses.evolving import MethodState


@kd_methods.register("gkd")
@dataclass(frozen=True, kw_only=True)
class GeneralizedKD(AroundBase, StudentAnswers):
    """The divergence of `base`, in a share `student_share` of the steps on answers that the student writes itself.

    GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm 1: one coin a step, the same in all processes, decides for the
    whole global batch. `student_share` is the paper's λ: 0 is supervised, 1 on-policy distillation. No gradient flows
    through the sampling. In a step on generated rows the loss is the divergence alone; in the others the stage's
    `kd_ratio` weighs it against cross entropy with the gold tokens, which the paper does not have.
    Deviation: the mean is over the tokens of the global batch, where the paper takes that of sequences of token means.
    """

    needs_teacher: ClassVar[bool] = True
    student_share: Annotated[float, Field(ge=0, le=1)]

    @property
    def generates(self) -> bool:
        return self.student_share > 0

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        if derive_fraction(seed, "student share", step) < self.student_share:
            return (Part("generated", 1.0),)
        return (Part("gold", kd_ratio),)

    def for_step(self, progress: float, state: MethodState) -> KDMethod:
        return evolving.for_step(self.base, progress, state)

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        divergence_N: Tensor = self.base(student_logprobs_NV, teacher_logprobs_NV)
        return divergence_N
