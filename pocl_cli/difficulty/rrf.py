"""Reciprocal rank fusion of ROUGE-L and cross entropy: the difficulty of POCL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from pocl_cli.difficulty.ranking import average_ranks
from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("rrf")
@dataclass(frozen=True, kw_only=True)
class ReciprocalRankFusion:
    """Difficulty −(1/(k + rank of ROUGE-L) + 1/(k + rank of cross entropy)), rank 1 = easiest; no unit.

    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.
    POCL, arXiv 2506.05695; the fusion is that of Cormack et al. 2009 (SIGIR).

    Deviation: tied rows share the mean of the ranks that they cover; POCL's code ranks them by file order.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rouge_l", "cross_entropy"})

    k: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def __call__(self, scores: Scores) -> FloatArray:
        rouge_ranks = average_ranks(-scores.column("rouge_l"))
        cross_entropy_ranks = average_ranks(scores.column("cross_entropy"))
        return -(1 / (self.k + rouge_ranks) + 1 / (self.k + cross_entropy_ranks))
