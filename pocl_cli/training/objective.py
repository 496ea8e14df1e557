"""The objective: from rows and hidden states to one number and its gradient.

The only place that shifts labels, masks, applies temperature, runs output heads, sums and normalises.

B rows, L positions, N response tokens of a batch, n of a chunk, D and E hidden sizes of student and teacher,
V logits of real tokens.
"""

# ruff: noqa: N815 (fields carry shape suffixes too)
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocl_cli.losses.divergence import KDMethod
from pocl_cli.models.batch import Batch
from pocl_cli.records import TokenisedRow

# Peak memory of a chunk per token and real token: logits, log-probabilities and their gradients of both models, in
# float32. Measured with gradients: 49 bytes for jsd, 43 srkl, 40 sfkl, 28 fkl and rkl, 27 tvd, 20 sft; the rest is for
# 16-bit logits beside their float32 copy, padding rows, and the allocator.
BYTES_PER_LOGIT = 64


def response_positions(num_prompt_tokens: int, num_response_tokens: int) -> slice:
    """The positions of a row that predict its response: position t predicts token t + 1."""
    assert num_prompt_tokens > 0, "a row needs a prompt token that predicts the first token of its response"
    return slice(num_prompt_tokens - 1, num_prompt_tokens - 1 + num_response_tokens)


def collate(rows: Sequence[TokenisedRow], pad_id: int) -> Batch:
    """Puts rows side by side, padded on the right to the longest.

    Masks and targets come from the lengths, never from `pad_id`: where EOS is also the padding token, it is trained on.
    """
    shape = (len(rows), max(row.num_tokens for row in rows))
    input_ids_BL = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask_BL = torch.zeros(shape, dtype=torch.long)
    position_mask_BL = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids_BL[i, : row.num_tokens] = torch.tensor([*row.prompt_ids, *row.response_ids], dtype=torch.long)
        attention_mask_BL[i, : row.num_tokens] = 1
        position_mask_BL[i, response_positions(len(row.prompt_ids), len(row.response_ids))] = True
    targets_N = torch.tensor([token for row in rows for token in row.response_ids], dtype=torch.long)
    return Batch(tuple(row.id for row in rows), input_ids_BL, attention_mask_BL, position_mask_BL, targets_N)


class ObjectiveOutput(NamedTuple):
    """What the objective gives. All but `loss` are free of gradients.

    Attributes:
        loss: [(1 − a)·ΣCE + a·T²·ΣD] / normaliser, without T² where the method says so.
        ce_sum: ΣCE in nats, at temperature 1; reported also where its weight is 0.
        kd_sum: ΣD at the stage's temperature, in nats, without T²; 0 where the distillation term is not computed.
        num_tokens: N.
        ce_N: cross entropy per response token.
        kd_N: divergence per response token.
    """

    loss: Tensor
    ce_sum: Tensor
    kd_sum: Tensor
    num_tokens: Tensor
    ce_N: Tensor
    kd_N: Tensor


def effective_kd_ratio(method: KDMethod, kd_ratio: float) -> float:
    """The weight of the distillation term: `kd_ratio`, or 0 for a method without a teacher. 0 means: run no teacher."""
    return kd_ratio if method.needs_teacher else 0.0


def tokens_per_chunk(num_logits: int, memory_mb: float) -> int:
    """How many response tokens fit into `memory_mb` MiB at once; at least 1."""
    return max(1, int(memory_mb * 2**20) // (num_logits * BYTES_PER_LOGIT))


def distillation_loss(
    student_hidden_ND: Tensor,
    student_head: nn.Module,
    targets_N: Tensor,
    *,
    method: KDMethod,
    kd_ratio: float,
    temperature: float,
    num_real_tokens: int,
    normaliser: float,
    chunk_tokens: int,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: nn.Module | None = None,
) -> ObjectiveOutput:
    """The distillation loss of N response tokens, worked through in chunks.

    Logits exist for one chunk at a time. Where gradients are wanted, those of the hidden states and of the student
    head's parameters are computed here, chunk by chunk, and `loss.backward()` only scales and hands them on.

    Args:
        student_hidden_ND: the student's final hidden states where the next token is a response token.
        student_head: hidden states → logits, at least `num_real_tokens` wide.
        targets_N: the response tokens.
        method: the divergence.
        kd_ratio: a, the weight of the distillation term, 0..1.
        temperature: T; divides both models' logits in the distillation term, and only there.
        num_real_tokens: V; logits from there on are padding rows and are cut off.
        normaliser: number of response tokens of the global batch; may be 0 only where N is.
        chunk_tokens: response tokens at a time, from `tokens_per_chunk`.
        teacher_hidden_NE: the teacher's hidden states of the same tokens; not read where the effective ratio is 0.
        teacher_head: the teacher's head; not read where the effective ratio is 0.
    """
    ratio = effective_kd_ratio(method, kd_ratio)
    assert 0 <= ratio <= 1, f"kd_ratio must be in 0..1, got {kd_ratio}"
    assert len(student_hidden_ND) == len(targets_N), "one hidden state per response token"
    assert normaliser > 0 or len(targets_N) == 0, "response tokens with a normaliser of 0"
    scale = 1 / normaliser if normaliser else 0.0
    teacher = None
    if ratio:
        assert teacher_hidden_NE is not None, f"{method!r} needs the teacher's hidden states"
        assert teacher_head is not None, f"{method!r} needs the teacher's head"
        assert len(teacher_hidden_NE) == len(targets_N), "one teacher's hidden state per response token"
        teacher = (teacher_head, teacher_hidden_NE)
    terms = _Terms(
        student_head=student_head,
        teacher=teacher,
        targets_N=targets_N,
        method=method,
        temperature=temperature,
        num_real_tokens=num_real_tokens,
        ce_weight=(1 - ratio) * scale,
        kd_weight=ratio * (temperature**2 if method.t_squared else 1.0) * scale,
    )
    parameters = [parameter for parameter in student_head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (student_hidden_ND.requires_grad or parameters):
        loss, ce_N, kd_N = _LossWithGradient.apply(student_hidden_ND, terms, chunk_tokens, *parameters)  # type: ignore[no-untyped-call]
    else:
        ce_N, kd_N = terms.empty(student_hidden_ND)
        for chunk in _chunks(len(targets_N), chunk_tokens):
            ce_N[chunk], kd_N[chunk] = terms.per_token(student_hidden_ND[chunk], chunk)
        loss = terms.weigh(ce_N, kd_N)
    return ObjectiveOutput(loss, ce_N.sum(), kd_N.sum(), ce_N.new_tensor(len(ce_N)), ce_N, kd_N)


@torch.no_grad()
def cross_entropy_per_token(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, *, num_real_tokens: int, chunk_tokens: int
) -> Tensor:
    """Negative log-likelihood of each target `[N]` in nats, without gradients, in chunks."""
    ce_N = torch.empty(len(targets_N), dtype=_at_least_float32(hidden_ND.dtype), device=hidden_ND.device)
    for chunk in _chunks(len(targets_N), chunk_tokens):
        ce_N[chunk] = _cross_entropy(_real_logits(head, hidden_ND[chunk], num_real_tokens), targets_N[chunk])
    return ce_N


@dataclass(frozen=True, slots=True)
class _Terms:
    """Both terms of the loss for any chunk of the batch's response tokens."""

    student_head: nn.Module
    teacher: tuple[nn.Module, Tensor] | None
    targets_N: Tensor
    method: KDMethod
    temperature: float
    num_real_tokens: int
    ce_weight: float
    kd_weight: float

    def empty(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both terms per token; zeros, so that a term which is not computed reads 0."""
        dtype = _at_least_float32(hidden_ND.dtype)
        return hidden_ND.new_zeros(len(hidden_ND), dtype=dtype), hidden_ND.new_zeros(len(hidden_ND), dtype=dtype)

    def per_token(self, hidden_nD: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Cross entropy and divergence per token of a chunk, from the same logits of the student."""
        logits_nV = _real_logits(self.student_head, hidden_nD, self.num_real_tokens)
        ce_n = _cross_entropy(logits_nV, self.targets_N[chunk])
        if self.teacher is None:
            return ce_n, torch.zeros_like(ce_n)
        teacher_head, teacher_hidden_NE = self.teacher
        with torch.no_grad():
            teacher_nV = _real_logits(teacher_head, teacher_hidden_NE[chunk], self.num_real_tokens)
            teacher_nV = (teacher_nV / self.temperature).log_softmax(dim=-1)
        return ce_n, self.method((logits_nV / self.temperature).log_softmax(dim=-1), teacher_nV)

    def weigh(self, ce_n: Tensor, kd_n: Tensor) -> Tensor:
        """The share of these tokens in the loss."""
        loss = ce_n.new_zeros(())
        # A term of weight 0 stays out: it may be infinite, and 0·inf is NaN.
        if self.ce_weight:
            loss = loss + self.ce_weight * ce_n.sum()
        if self.kd_weight:
            loss = loss + self.kd_weight * kd_n.sum()
        return loss


class _LossWithGradient(torch.autograd.Function):
    """Computes the loss and, in the same pass over the chunks, its gradients.

    The gradients of the head add up in at least float32 whatever the parameters' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, terms: _Terms, chunk_tokens: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ce_N, kd_N = terms.empty(hidden_ND)
        hidden_gradient_ND = torch.zeros_like(hidden_ND)
        gradients = [torch.zeros_like(one, dtype=_at_least_float32(one.dtype)) for one in parameters]
        for chunk in _chunks(len(hidden_ND), chunk_tokens):
            with torch.enable_grad():
                hidden_nD = hidden_ND[chunk].detach().requires_grad_(True)
                ce_n, kd_n = terms.per_token(hidden_nD, chunk)
                loss = terms.weigh(ce_n, kd_n)
            ce_N[chunk], kd_N[chunk] = ce_n.detach(), kd_n.detach()
            # A method may not depend on the student at all (skew KL at alpha 1).
            if loss.requires_grad:
                chunk_gradients = torch.autograd.grad(
                    loss, (hidden_nD, *parameters), allow_unused=True, materialize_grads=True
                )
                hidden_gradient_ND[chunk] = chunk_gradients[0]
                for total, part in zip(gradients, chunk_gradients[1:], strict=True):
                    total += part
        ctx.save_for_backward(hidden_gradient_ND, *gradients)
        ctx.mark_non_differentiable(ce_N, kd_N)
        return terms.weigh(ce_N, kd_N), ce_N, kd_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_ce_N: Tensor, grad_kd_N: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd casts each gradient to its parameter's dtype.
        hidden_gradient_ND, *gradients = (gradient * grad_loss for gradient in ctx.saved_tensors)
        return hidden_gradient_ND, None, None, *gradients


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens))


def _real_logits(head: nn.Module, hidden_nD: Tensor, num_real_tokens: int) -> Tensor:
    logits_nV: Tensor = head(hidden_nD)[:, :num_real_tokens]
    return logits_nV.to(_at_least_float32(logits_nV.dtype))


def _cross_entropy(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    return logits_nV.logsumexp(dim=-1) - logits_nV.gather(-1, targets_n[:, None]).squeeze(-1)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
