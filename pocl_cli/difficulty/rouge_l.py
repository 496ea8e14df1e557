"""ROUGE-L of the student's own answer alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("rouge_l")
@dataclass(frozen=True, kw_only=True)
class RougeL:
    """Difficulty −ROUGE-L F1 (−1..0): rows that the student already answers as the reference does are easy.

    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.
    A control of POCL, arXiv 2506.05695: one of its two metrics alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rouge_l"})

    def __call__(self, scores: Scores) -> FloatArray:
        return -scores.column("rouge_l")
