"""Attention: over how many tokens the student has to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.records import ATTENTION
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("attention")
@dataclass(frozen=True, kw_only=True)
class Attention:
    """Difficulty = −variance of the student's attention weights: rows over which it has to look widely are hard.

    Of each response token the variance over the tokens that it sees; the mean over heads, layers and response tokens;
    no unit. The "attention score variance" of Kim & Lee 2024, arXiv 2405.07490, by which a text is the harder the wider
    the range of tokens that a model attends to.
    Raises ArtifactError where a row lacks a measurement, NonFiniteError where one is not finite.

    Deviation: written from the paper's abstract and a review of it, not from its formula. That heads and layers count
    alike, that the response tokens are what looks, and that a low variance is hard is our reading.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})

    def __call__(self, scores: Scores) -> FloatArray:
        return -scores.column(ATTENTION)
