"""Sequence-level distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pocl_cli.losses.on_policy import Part
from pocl_cli.records import AnswerDecoding
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.evolving import MethodState


@kd_methods.register("seqkd")
@dataclass(frozen=True, kw_only=True)
class TeacherAnswers:
    """Cross entropy with the teacher's own answers in place of the gold responses, whatever `kd_ratio` is.

    SeqKD, Kim and Rush 2016, arXiv 1606.07947, section 3.2. The answers are an artifact that is made once, before
    training, which then needs no teacher. Dev rows and difficulty keep the gold responses. An answer that a length
    limit cut has no EOS.
    Deviation: the paper takes the answer of highest probability that beam search finds; here it is drawn as `decoding`
    says (by default as the published GPT-2 baselines draw theirs, at temperature 1), and greedily at 0. The reference
    of POCL adds a loss on plain text, which is left out.
    """

    needs_teacher: ClassVar[bool] = False
    answers_of: ClassVar[frozenset[str]] = frozenset({"teacher"})
    t_squared: ClassVar[bool] = False
    decoding: AnswerDecoding

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        return (Part("teacher", 0.0),)

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        raise AssertionError("seqkd has no distillation term: the objective must not ask for it")
