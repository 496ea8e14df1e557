"""Contrastive distillation on stored answers of teacher and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.on_policy import Part
from pocl_cli.losses.skew_forward_kl import SkewForwardKL
from pocl_cli.losses.skew_reverse_kl import SkewReverseKL
from pocl_cli.records import AnswerDecoding
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.evolving import MethodState


@kd_methods.register("distillm2")
@dataclass(frozen=True, kw_only=True)
class ContrastiveAnswers:
    """(2 − β)·skew forward KL on the teacher's answers + β·skew reverse KL on the student's, mixed by `alpha`.

    DistiLLM-2, Ko et al. 2025, arXiv 2503.07067, section 3. β rises from 1 to `student_weight_end` over the first half
    of the steps and stays there: 1.5 with the released code's gradual β, 1 without. Each row of a batch counts twice,
    once with the stored answer of either model; each divergence is a mean over the tokens of its own answers. A stage's
    `kd_ratio` a weighs both by a and cross entropy with the gold responses, which the paper does not have, by 1 − a.
    Called by itself it is the sum of both divergences.
    Deviation: the student's answers are those of the student before distillation, drawn once, where the paper draws
    them anew before each of its iterations. `alpha` is the same for all rows, as the released code has it by default;
    the paper's, which follows each row's gap between teacher and student, is left out. Means are over the tokens of the
    global batch, not over those of sequences. The student in the mixture of the reverse divergence is differentiated
    as well.
    """

    needs_teacher: ClassVar[bool] = True
    answers_of: ClassVar[frozenset[str]] = frozenset({"teacher", "student"})
    alpha: Annotated[float, Field(ge=0, lt=1)]
    student_weight_end: Annotated[float, Field(ge=1, le=2)]
    t_squared: bool
    decoding: AnswerDecoding

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        weight = 1 + (self.student_weight_end - 1) * min(1.0, 2 * progress)
        return (
            Part("teacher", 1.0, kd_ratio * (2 - weight), self._on_teachers_answers),
            Part("student", 1.0, kd_ratio * weight, self._on_students_answers),
            Part("gold", 0.0, 1 - kd_ratio),
        )

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        forward_N = self._on_teachers_answers(student_logprobs_NV, teacher_logprobs_NV)
        return forward_N + self._on_students_answers(student_logprobs_NV, teacher_logprobs_NV)

    @property
    def _on_teachers_answers(self) -> SkewForwardKL:
        return SkewForwardKL(alpha=self.alpha, t_squared=self.t_squared)

    @property
    def _on_students_answers(self) -> SkewReverseKL:
        return SkewReverseKL(alpha=self.alpha, t_squared=self.t_squared)
