"""Reciprocal rank fusion; of ROUGE-L and cross entropy, the difficulty of POCL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from pocl_cli.difficulty.fusion import Fusion
from pocl_cli.difficulty.scores import FloatArray
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("rrf")
@dataclass(frozen=True, kw_only=True)
class ReciprocalRankFusion(Fusion):
    """Difficulty −Σ w/(k + rank) over the members, rank 1 = easiest; no unit.

    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.
    POCL, arXiv 2506.05695, with members `rouge_l` and `cross_entropy`; the fusion is that of Cormack et al. 2009
    (SIGIR), who have no weights.

    Deviation: tied rows share the mean of the ranks that they cover; POCL's code ranks them by file order.
    """

    k: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def _fused(self, ranks: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
        fused = np.zeros_like(ranks[0])
        for weight, rank in zip(weights, ranks, strict=True):
            fused -= weight / (self.k + rank)
        return fused
