"""Mean rank: fusion in which every rank counts the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocl_cli.difficulty.fusion import Fusion
from pocl_cli.difficulty.scores import FloatArray
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("mean_rank")
@dataclass(frozen=True, kw_only=True)
class MeanRank(Fusion):
    """Difficulty Σ w·rank / Σ w over the members, in ranks: the Borda count, which `rrf` tends to as its k grows.

    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.
    An alternative to the fusion of POCL, arXiv 2506.05695; Borda counts as in Aslam & Montague 2001 (SIGIR).
    """

    def _fused(self, ranks: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
        mean = np.zeros_like(ranks[0])
        for weight, rank in zip(weights, ranks, strict=True):
            mean += weight / sum(weights) * rank
        return mean
