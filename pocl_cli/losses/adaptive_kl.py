"""Adaptive Kullback-Leibler divergence: forward KL where the head is wrong, reverse KL where the tail is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses.divergence import kl_divergence
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor


@kd_methods.register("akl")
@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """g_h/(g_h + g_t)·KL(p ‖ q) + g_t/(g_h + g_t)·KL(q ‖ p) per response token, in nats; p teacher, q student.

    AKL, Wu et al. 2025, arXiv 2404.02657. The head is the smallest set of the teacher's likeliest entries
    that holds at least `head_mass` (the paper's μ, 0.5) of p; g_h and g_t are Σ|p − q| over the head and over the rest.
    The two weights count as constants: no gradient flows through them.
    Deviation: where p = q, where the paper's quotient is 0/0, both weights are ½. The authors' code counts the entry
    that brings the head to μ with the tail, unless it is the likeliest of all.
    """

    needs_teacher: ClassVar[bool] = True
    head_mass: Annotated[float, Field(gt=0, lt=1)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        weight_N = self._head_weight(student_logprobs_NV.detach(), teacher_logprobs_NV)
        forward_N = kl_divergence(teacher_logprobs_NV, student_logprobs_NV)
        reverse_N = kl_divergence(student_logprobs_NV, teacher_logprobs_NV)
        return weight_N * forward_N + (1 - weight_N) * reverse_N

    def _head_weight(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        """The head's share of Σ|p − q| per token `[N]`."""
        probs_NV, order_NV = teacher_logprobs_NV.exp().sort(dim=-1, descending=True, stable=True)
        gaps_NV = (probs_NV - student_logprobs_NV.gather(-1, order_NV).exp()).abs()
        total_N = gaps_NV.sum(dim=-1)
        # An entry belongs to the head as long as those before it do not yet hold the mass.
        before_NV = probs_NV.cumsum(dim=-1) - probs_NV
        head_N = gaps_NV.masked_fill(before_NV >= self.head_mass, 0.0).sum(dim=-1)
        return (head_N / total_N).masked_fill(total_N == 0, 0.5)
