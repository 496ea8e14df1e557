"""Length alone: the baseline that looks at no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers


@difficulty_measurers.register("length")
@dataclass(frozen=True, kw_only=True)
class Length:
    """Difficulty = number of tokens of the prompt, the response (EOS counts) or both: short rows are easy.

    Prompt length as in Kim & Lee 2024, arXiv 2405.07490; sentence length as in Platanios et al. 2019, arXiv 1903.09848.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"num_prompt_tokens", "num_response_tokens"})

    part: Literal["prompt", "response", "both"]

    def __call__(self, scores: Scores) -> FloatArray:
        if self.part == "both":
            return scores.column("num_prompt_tokens") + scores.column("num_response_tokens")
        return scores.column(f"num_{self.part}_tokens")
