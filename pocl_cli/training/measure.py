"""Cross entropy of given responses under a model, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.training.objective import collate, cross_entropy_per_token, tokens_per_chunk
from pocl_cli.training.sampler import micro_batches
from pocl_cli.training.shards import shard_batches

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pocl_cli.models.batch import Batch
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.models.teacher import Teacher


@torch.no_grad()
def measure_cross_entropy(
    headed: HeadedModel,
    rows: Sequence[TokenisedRow],
    *,
    num_real_tokens: int,
    pad_token_id: int,
    hardware: Hardware,
    advance: Callable[[int], None] | None = None,
) -> list[ScoredRecord]:
    """The cross entropy of each row's response given its prompt, in nats per response token (EOS counts), in order.

    The model is in evaluation mode meanwhile.
    """
    was_training = headed.training
    headed.eval()
    measured: dict[str, ScoredRecord] = {}
    for group in micro_batches(rows, hardware.max_tokens_per_micro_batch):
        batch = collate(group, pad_token_id).to(hardware.device)
        with hardware.autocast():
            hidden_ND = headed.hidden_states(batch.input_ids_BL, batch.attention_mask_BL, batch.position_mask_BL)
            ce_N = _cross_entropy(hidden_ND, headed.head, batch, headed.num_logits, num_real_tokens, hardware)
        measured.update((row.id, row) for row in _means(group, ce_N))
        if advance is not None:
            advance(len(group))
    headed.train(was_training)
    return [measured[row.id] for row in rows]


@torch.no_grad()
def measure_teacher(
    teacher: Teacher, shard: Sequence[TokenisedRow], *, num_real_tokens: int, pad_token_id: int, hardware: Hardware
) -> list[ScoredRecord]:
    """As `measure_cross_entropy`, for a shard of `training.shards` and in its batches.

    A teacher that stores its hidden states and one that does not so give the same bytes.
    """
    measured: list[ScoredRecord] = []
    for group in shard_batches(shard):
        batch = collate(group, pad_token_id).to(hardware.device)
        with hardware.autocast():
            hidden_NE = teacher.hidden_states(batch)
            ce_N = _cross_entropy(hidden_NE, teacher.head, batch, teacher.num_logits, num_real_tokens, hardware)
        measured += _means(group, ce_N)
    return measured


def _cross_entropy(
    hidden_ND: Tensor, head: nn.Module, batch: Batch, num_logits: int, num_real_tokens: int, hardware: Hardware
) -> Tensor:
    chunk_tokens = tokens_per_chunk(num_logits, hardware.objective_memory_mb)
    return cross_entropy_per_token(
        hidden_ND, head, batch.targets_N, num_real_tokens=num_real_tokens, chunk_tokens=chunk_tokens
    )


def _means(group: Sequence[TokenisedRow], ce_N: Tensor) -> list[ScoredRecord]:
    lengths = [len(row.response_ids) for row in group]
    return [
        ScoredRecord(row.id, len(row.prompt_ids), len(row.response_ids), float(ce_n.mean()))
        for row, ce_n in zip(group, ce_N.cpu().double().split(lengths), strict=True)
    ]
