"""Cross entropy of the reference response alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("cross_entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Difficulty = the student's mean negative log-likelihood of the response, in nats per response token.

    Raises NonFiniteError where a measurement is not finite.
    A control of POCL, arXiv 2506.05695: one of its two metrics alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})

    def __call__(self, scores: Scores) -> FloatArray:
        return scores.column("cross_entropy")
