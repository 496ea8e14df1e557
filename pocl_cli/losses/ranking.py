"""Ranking loss over the likeliest entries, beside any other method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses import evolving
from pocl_cli.losses.composition import AroundBase
from pocl_cli.losses.divergence import LOG_ZERO
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.evolving import MethodState


@kd_methods.register("ranking")
@dataclass(frozen=True, kw_only=True)
class Ranking(AroundBase):
    """The divergence of `base`, and `weight` times a loss of rank correlation, per response token.

    RLKD, Peng & Zhang 2025, arXiv 2409.12545: 1 − Spearman's correlation between teacher and student over the union of
    the `top_k` likeliest entries of both, so that the student learns the order of the teacher's peaks. It is
    6·Σ(r − s)² / (n·(n² − 1)) for n entries with ranks r and s: 0 for the same order, 2 for the reverse.
    The base's `t_squared` holds for the sum.
    Deviation: ranks are made differentiable by pairwise sigmoids of the tempered log-probabilities' differences,
    rank_i = ½ + Σ_j σ(x_j − x_i), for both sides: equal distributions give exactly 0. The authors' code has soft ranks
    of torchsort instead, and adds half the divergence to the ranking loss: the shipped `weight` 2 and `top_k` 5 are
    those of its fine-tuning, but for the scale of the whole.
    """

    needs_teacher: ClassVar[bool] = True
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_k: Annotated[int, Field(ge=2)]

    def for_step(self, progress: float, state: MethodState) -> Ranking:
        return replace(self, base=evolving.for_step(self.base, progress, state))

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        divergence_N: Tensor = self.base(student_logprobs_NV, teacher_logprobs_NV)
        return divergence_N + self.weight * self._rank_distance(student_logprobs_NV, teacher_logprobs_NV)

    def _rank_distance(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        """1 − Spearman's correlation per token `[N]`; K entries, of which the union's are `counted_NK`."""
        top_k = min(self.top_k, student_logprobs_NV.shape[-1])
        likely_NK = teacher_logprobs_NV.topk(top_k, dim=-1).indices
        likely_to_student_NK = student_logprobs_NV.detach().topk(top_k, dim=-1).indices
        again_NK = (likely_to_student_NK[:, :, None] == likely_NK[:, None, :]).any(dim=-1)
        entries_NK = likely_NK.repeat(1, 2)
        entries_NK[:, top_k:] = likely_to_student_NK
        student_NK = student_logprobs_NV.gather(-1, entries_NK).clamp(min=LOG_ZERO)
        teacher_NK = teacher_logprobs_NV.gather(-1, entries_NK).clamp(min=LOG_ZERO)
        # An entry that neither side can choose has no rank.
        counted_NK = (student_NK > LOG_ZERO) | (teacher_NK > LOG_ZERO)
        counted_NK[:, top_k:] &= ~again_NK
        gaps_NK = _soft_ranks(teacher_NK, counted_NK) - _soft_ranks(student_NK, counted_NK)
        num_entries_N = counted_NK.sum(dim=-1).clamp(min=2).to(gaps_NK.dtype)
        squares_N = gaps_NK.masked_fill(~counted_NK, 0.0).square().sum(dim=-1)
        return 6 * squares_N / (num_entries_N * (num_entries_N.square() - 1))


def _soft_ranks(logprobs_NK: Tensor, counted_NK: Tensor) -> Tensor:
    """Rank of every entry among the counted ones, 1 for the likeliest; entries closer than about a nat share ranks."""
    above_NKK = (logprobs_NK[:, None, :] - logprobs_NK[:, :, None]).sigmoid()
    return 0.5 + (above_NKK * counted_NK[:, None, :]).sum(dim=-1)
