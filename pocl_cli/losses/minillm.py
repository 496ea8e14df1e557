"""Reverse KL between distributions of whole answers, by the gradient of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_divergence
from pocl_cli.losses.on_policy import Part
from pocl_cli.registry import kd_methods
from pocl_cli.schema import DecodingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.evolving import MethodState
    from pocl_cli.losses.on_policy import SampledTokens


@kd_methods.register("minillm")
@dataclass(frozen=True, kw_only=True)
class MiniLLM:
    """KL(q ‖ p) of whole answers that the student writes in every step, and cross entropy with the gold tokens.

    MiniLLM, Gu et al. 2024, arXiv 2306.08543, section 2.2; q student, p teacher. The gradient per token of an answer is

        ∇ KL(q(·) ‖ p(·)) + w·R·∇ log q(token),

    the single-step part over the whole vocabulary, and the long-term part, where R is log(q/p) of the tokens after it:
    their mean where `length_normalised` (the paper's), else their sum, with which the expectation is the gradient of
    KL(q ‖ p) between answers. Tokens are drawn from s, (1 − α)·student + α·teacher at `sampling_temperature`; α is
    `teacher_mix` (the paper's 0.2). w is q(token)/s(token), at most `max_weight`: 1 for α = 0 while distillation and
    sampling temperature are the same. The value is that of the single-step part, whose expectation is then KL(q ‖ p)
    between answers. Cross entropy on the gold rows has the weight 1 − kd_ratio.

    Deviation: each answer is used for one step, when the paper's clipped ratio of policies is 1; what is clipped is w,
    and from above alone. As in the authors' code, w counts in the long-term part only. Their code also scales, clips
    and whitens rewards, and begins R with the token itself; the formulas of the paper do not. The language-modelling
    loss is on the rows, not on a corpus for pre-training.
    """

    needs_teacher: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    teacher_mix: Annotated[float, Field(ge=0, lt=1)]
    length_normalised: bool
    max_weight: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    sampling_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    t_squared: bool

    @property
    def decoding(self) -> DecodingConfig:
        return DecodingConfig(
            sampling_temperature=self.sampling_temperature,
            top_p=1.0,
            top_k=0,
            no_repeat_ngram_size=0,
            max_new_tokens=self.max_new_tokens,
        )

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        return Part("generated", 1.0, kd_ratio), Part("gold", 0.0, 1 - kd_ratio)

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        return kl_divergence(student_logprobs_NV, teacher_logprobs_NV)

    def policy_weights(self, tokens: SampledTokens) -> Tensor:
        returns_N = tokens.student_N.new_empty(len(tokens.student_N))
        log_ratio_N, start = tokens.student_N - tokens.teacher_N, 0
        for length in tokens.lengths:
            answer = slice(start, start + length)
            returns_N[answer] = self._returns(log_ratio_N[answer])
            start += length
        weights_N = (tokens.student_N - tokens.drawn_N).exp().clamp(max=self.max_weight)
        return weights_N * returns_N

    def _returns(self, log_ratio_t: Tensor) -> Tensor:
        """R of each token of one answer: 0 for the last."""
        after_t = log_ratio_t.flip(0).cumsum(0).flip(0) - log_ratio_t
        if not self.length_normalised:
            return after_t
        num_after_t = log_ratio_t.new_ones(len(log_ratio_t)).cumsum(0).flip(0) - 1
        return after_t / num_after_t.clamp(min=1)
