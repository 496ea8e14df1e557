"""Teacher gap: how much better the teacher predicts the response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("teacher_gap")
@dataclass(frozen=True, kw_only=True)
class TeacherGap:
    """Difficulty = cross entropy of the student less that of the teacher, in nats per response token.

    Rows that are hard for both are not hard here: the teacher has nothing to give on them.
    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.
    The reducible loss of Mindermann et al. 2022, arXiv 2206.07137, with the teacher for their model of held-out data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"cross_entropy", "teacher_cross_entropy"})

    def __call__(self, scores: Scores) -> FloatArray:
        return scores.column("cross_entropy") - scores.column("teacher_cross_entropy")
