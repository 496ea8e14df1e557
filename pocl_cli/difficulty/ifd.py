"""Instruction-following difficulty: how little the instruction helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("ifd")
@dataclass(frozen=True, kw_only=True)
class InstructionFollowingDifficulty:
    """Difficulty PPL(y|x)/PPL(y): perplexity of the response after its prompt over that of the response alone.

    Above 1 the prompt makes the response less likely: such rows are usually faulty.
    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.
    Li et al. 2023, arXiv 2308.12032; with the student as the small model, Superfiltering, arXiv 2402.00530.

    Deviation: the response alone follows the token that begins a text, so that its first token and EOS count; there
    it is predicted from its second token on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"cross_entropy", "cross_entropy_alone"})

    def __call__(self, scores: Scores) -> FloatArray:
        ratio: FloatArray = np.exp(scores.column("cross_entropy") - scores.column("cross_entropy_alone"))
        return ratio
