"""The objective: from rows and hidden states to one number and its gradient.

The only place that shifts labels, masks, applies temperature, runs output heads, sums and normalises.

N response tokens of a batch, n of a chunk, t of a tile, D and E hidden sizes of student and
teacher, V logits.
"""

# ruff: noqa: N815 (fields carry shape suffixes too)
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl_cli.losses.divergence import KDMethod, log_mixture
from pocl_cli.losses.on_policy import PolicyGradient, SampledTokens
from pocl_cli.models.batch import Batch, make_batch
from pocl_cli.models.head import OutputHead
from pocl_cli.records import TokenisedRow
from pocl_cli.training.projection import project_with_gradient

# Memory of a chunk per token and logit: the logits of both models, in whose place their gradients are written; the rest
# is for 16-bit logits beside a float32 copy, and the allocator.
BYTES_PER_LOGIT = 12

# Peak memory of a tile per token and logit while the loss is computed: log-probabilities, their gradients and what the
# divergences keep of them, in float32. Measured: 49 bytes for jsd, 43 srkl, 40 sfkl, 28 fkl and rkl, 27 tvd, 20 sft.
BYTES_PER_LOGIT_OF_TILE = 56

# A CPU works faster on what its second-level cache holds, so the tensors of a tile are of this many bytes each.
# Elsewhere a tile is the whole chunk: there, launching many small kernels would cost more.
TILE_BYTES_ON_CPU = 2**20


def response_positions(num_prompt_tokens: int, num_response_tokens: int) -> range:
    """The positions of a row that predict its response: position t predicts token t + 1."""
    assert num_prompt_tokens > 0, "a row needs a prompt token that predicts the first token of its response"
    return range(num_prompt_tokens - 1, num_prompt_tokens - 1 + num_response_tokens)


def collate(rows: Sequence[TokenisedRow]) -> Batch:
    """Rows as a batch: which positions count and what follows them comes from the lengths, never from a token's id.

    Where EOS is also the padding token, it is trained on.
    """
    return make_batch(
        [row.id for row in rows],
        [[*row.prompt_ids, *row.response_ids] for row in rows],
        [response_positions(len(row.prompt_ids), len(row.response_ids)) for row in rows],
        [token for row in rows for token in row.response_ids],
    )


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


def tokens_per_chunk(num_logits: int, memory_mb: float, device: torch.device) -> int:
    """How many response tokens fit into `memory_mb` MiB at once; at least 1."""
    room, tile_tokens = int(memory_mb * 2**20) // num_logits, _tokens_per_tile(num_logits, device)
    one_tile = room // (BYTES_PER_LOGIT + BYTES_PER_LOGIT_OF_TILE)
    if tile_tokens is None or one_tile <= tile_tokens:
        return max(1, one_tile)
    return (room - tile_tokens * BYTES_PER_LOGIT_OF_TILE) // BYTES_PER_LOGIT


def distillation_loss(
    student_hidden_ND: Tensor,
    student_head: OutputHead,
    targets_N: Tensor,
    *,
    method: KDMethod,
    kd_ratio: float,
    temperature: float,
    num_real_tokens: int,
    normaliser: float,
    chunk_tokens: int,
    teacher_hidden_NE: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    answer_lengths: Sequence[int] | None = None,
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
        answer_lengths: where the student has sampled the tokens, those of each answer; a method that follows the
            gradient of a policy adds it then. None: the tokens are of another origin.
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
        if teacher is not None and answer_lengths is not None and isinstance(method, PolicyGradient):
            weights_N = _policy_weights(terms, method, student_hidden_ND, answer_lengths, chunk_tokens)
            terms = replace(terms, policy_weights_N=weights_N)
        loss, ce_N, kd_N = _LossWithGradient.apply(student_hidden_ND, terms, chunk_tokens, *parameters)  # type: ignore[no-untyped-call]
    else:
        ce_N, kd_N = terms.empty(student_hidden_ND)
        for chunk in _slices(len(targets_N), chunk_tokens):
            terms.evaluate(student_head.project(student_hidden_ND[chunk]), chunk, ce_N, kd_N)
        loss = terms.weigh(ce_N, kd_N)
    return ObjectiveOutput(loss, ce_N.sum(), kd_N.sum(), ce_N.new_tensor(len(ce_N)), ce_N, kd_N)


@torch.no_grad()
def cross_entropy_per_token(
    hidden_ND: Tensor,
    head: OutputHead,
    targets_N: Tensor,
    *,
    num_real_tokens: int,
    chunk_tokens: int,
    temperature: float = 1.0,
) -> Tensor:
    """Negative log-likelihood of each target `[N]` in nats, without gradients, in chunks."""
    ce_N = torch.empty(len(targets_N), dtype=_at_least_float32(hidden_ND.dtype), device=hidden_ND.device)
    for chunk in _slices(len(targets_N), chunk_tokens):
        projected_nV = head.project(hidden_ND[chunk])
        for tile, tokens in _tiles(projected_nV, chunk):
            logits_tV = _real_logits(head, projected_nV[tile], num_real_tokens)
            if temperature != 1:
                logits_tV = logits_tV / temperature
            ce_N[tokens] = logits_tV.logsumexp(dim=-1) - _at_targets(logits_tV, targets_N[tokens])
    return ce_N


def _policy_weights(
    terms: _Terms, method: PolicyGradient, hidden_ND: Tensor, lengths: Sequence[int], chunk_tokens: int
) -> Tensor:
    """The policy's constant of each token `[N]`, from a pass over the chunks of its own: it depends on later tokens."""
    assert sum(lengths) == len(hidden_ND), "the answers have all tokens"

    def logprobs(temperature: float) -> tuple[Tensor, Tensor]:
        assert terms.teacher is not None, "a policy follows a teacher"
        sides = ((terms.student_head, hidden_ND), terms.teacher)
        student_N, teacher_N = (
            -cross_entropy_per_token(
                hidden,
                head,
                terms.targets_N,
                num_real_tokens=terms.num_real_tokens,
                chunk_tokens=chunk_tokens,
                temperature=temperature,
            )
            for head, hidden in sides
        )
        return student_N, teacher_N

    student_N, teacher_N = at_drawing = logprobs(terms.temperature)
    if method.sampling_temperature != terms.temperature:
        at_drawing = logprobs(method.sampling_temperature)
    drawn_N = at_drawing[0]
    if method.teacher_mix:
        drawn_N = log_mixture(at_drawing[1], drawn_N, method.teacher_mix)
    return method.policy_weights(SampledTokens(student_N, teacher_N, drawn_N, lengths))


@dataclass(frozen=True, slots=True)
class _Terms:
    """Both terms of the loss, and their gradients, for any chunk of the batch's response tokens."""

    student_head: OutputHead
    teacher: tuple[OutputHead, Tensor] | None
    targets_N: Tensor
    method: KDMethod
    temperature: float
    num_real_tokens: int
    ce_weight: float
    kd_weight: float
    policy_weights_N: Tensor | None = None

    def empty(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Room for both terms per token; zeros, so that a term which is not computed reads 0."""
        dtype = _at_least_float32(hidden_ND.dtype)
        return hidden_ND.new_zeros(len(hidden_ND), dtype=dtype), hidden_ND.new_zeros(len(hidden_ND), dtype=dtype)

    def evaluate(
        self, projected_nV: Tensor, chunk: slice, ce_N: Tensor, kd_N: Tensor, *, with_gradient: bool = False
    ) -> None:
        """Writes cross entropy and divergence of a chunk's tokens into `ce_N` and `kd_N`.

        With `with_gradient`, the gradient with respect to the student's projected chunk takes that chunk's place.
        """
        teacher_nV = None
        if self.teacher is not None:
            teacher_head, teacher_hidden_NE = self.teacher
            with torch.no_grad():
                teacher_nV = teacher_head.project(teacher_hidden_NE[chunk])
        for tile, tokens in _tiles(projected_nV, chunk):
            projected_tV = projected_nV[tile].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits_tV = _real_logits(self.student_head, projected_tV, self.num_real_tokens)
            teacher_tV = None if teacher_nV is None else self._teacher_logprobs(teacher_nV[tile])
            ce_N[tokens], kd_N[tokens], gradient_tV = self._per_token(
                logits_tV.detach(), teacher_tV, self.targets_N[tokens], with_gradient=with_gradient
            )
            if with_gradient and self.policy_weights_N is not None:
                assert gradient_tV is not None, "there is a gradient"
                self._add_policy_gradient(gradient_tV, logits_tV.detach(), tokens)
            if with_gradient:
                (projected_nV[tile],) = torch.autograd.grad(logits_tV, projected_tV, gradient_tV)

    @torch.no_grad()
    def _teacher_logprobs(self, projected_tV: Tensor) -> Tensor:
        assert self.teacher is not None, "no teacher"
        return self._tempered(_real_logits(self.teacher[0], projected_tV, self.num_real_tokens))

    def _tempered(self, logits_tV: Tensor) -> Tensor:
        """Log-probabilities at the stage's temperature."""
        return (logits_tV if self.temperature == 1 else logits_tV / self.temperature).log_softmax(dim=-1)

    def _per_token(
        self, logits_tV: Tensor, teacher_logprobs_tV: Tensor | None, targets_t: Tensor, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cross entropy and divergence per token `[t]`, and the gradient of the student's logits."""
        log_normaliser_t = logits_tV.logsumexp(dim=-1)
        ce_t = log_normaliser_t - _at_targets(logits_tV, targets_t)
        kd_t, gradient_tV = torch.zeros_like(ce_t), None
        if teacher_logprobs_tV is not None:
            with torch.set_grad_enabled(with_gradient):
                leaf_tV = logits_tV.requires_grad_(with_gradient)
                kd_t = self.method(self._tempered(leaf_tV), teacher_logprobs_tV)
            # A method may not depend on the student at all (skew KL at alpha 1).
            if kd_t.requires_grad:
                (gradient_tV,) = torch.autograd.grad(kd_t, leaf_tV, torch.full_like(kd_t, self.kd_weight))
            logits_tV, kd_t = logits_tV.detach(), kd_t.detach()
        if with_gradient and gradient_tV is None:
            gradient_tV = torch.zeros_like(logits_tV)
        if gradient_tV is not None and self.ce_weight:
            # The gradient of −log softmax at the target: softmax, and one less at the target.
            gradient_tV.add_((logits_tV - log_normaliser_t[:, None]).exp_(), alpha=self.ce_weight)
            gradient_tV.scatter_add_(-1, targets_t[:, None], gradient_tV.new_full((len(targets_t), 1), -self.ce_weight))
        return ce_t, kd_t, gradient_tV

    def _add_policy_gradient(self, gradient_tV: Tensor, logits_tV: Tensor, tokens: slice) -> None:
        """Adds c·∇ log q(target) to the gradient of the student's logits: c/T at the target, less c/T · q."""
        assert self.policy_weights_N is not None, "there is no policy"
        scale_t1 = self.policy_weights_N[tokens, None] * (self.kd_weight / self.temperature)
        gradient_tV.sub_(self._tempered(logits_tV).exp_().mul_(scale_t1))
        gradient_tV.scatter_add_(-1, self.targets_N[tokens, None], scale_t1.to(gradient_tV.dtype))

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
        for chunk in _slices(len(hidden_ND), chunk_tokens):
            projected_nV, backward = project_with_gradient(terms.student_head, hidden_ND[chunk], parameters)
            terms.evaluate(projected_nV, chunk, ce_N, kd_N, with_gradient=True)
            hidden_gradient_ND[chunk] = backward(projected_nV, gradients)
        # On the context itself and not among its saved tensors: without another reference, autograd takes a gradient
        # over as it is instead of copying it.
        ctx.gradients = [hidden_gradient_ND, *gradients]
        ctx.mark_non_differentiable(ce_N, kd_N)
        return terms.weigh(ce_N, kd_N), ce_N, kd_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_ce_N: Tensor, grad_kd_N: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients, "backward through the objective works once"
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            gradient.mul_(grad_loss)
        # Autograd casts each gradient to its parameter's dtype.
        return gradients[0], None, None, *gradients[1:]


def _slices(num_tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _tiles(projected_nV: Tensor, chunk: slice) -> Iterator[tuple[slice, slice]]:
    """The tiles of a chunk: where each lies in the chunk, and in the batch."""
    size = _tokens_per_tile(projected_nV.shape[-1], projected_nV.device) or len(projected_nV)
    for tile in _slices(len(projected_nV), size):
        yield tile, slice(chunk.start + tile.start, chunk.start + tile.stop)


def _tokens_per_tile(num_logits: int, device: torch.device) -> int | None:
    """Response tokens of a tile; None where it is the whole chunk."""
    return max(1, TILE_BYTES_ON_CPU // (4 * num_logits)) if device.type == "cpu" else None


def _real_logits(head: OutputHead, projected_tV: Tensor, num_real_tokens: int) -> Tensor:
    logits_tV = head.shape_logits(projected_tV)
    if logits_tV.shape[-1] != num_real_tokens:
        logits_tV = logits_tV[:, :num_real_tokens]
    return logits_tV.to(_at_least_float32(logits_tV.dtype))


def _at_targets(logits_tV: Tensor, targets_t: Tensor) -> Tensor:
    return logits_tV.gather(-1, targets_t[:, None]).squeeze(-1)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
