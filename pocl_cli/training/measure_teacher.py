"""Cross entropy of given responses under the teacher, in the pass that stores its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pocl_cli import faults
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.training.objective import collate, cross_entropy_per_token, tokens_per_chunk
from pocl_cli.training.shards import shard_batches

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.teacher import Teacher


@torch.no_grad()
def measure_teacher(
    teacher: Teacher, shard: Sequence[TokenisedRow], *, num_real_tokens: int, hardware: Hardware
) -> list[ScoredRecord]:
    """The cross entropy of each row of a shard (`training.shards`), in nats per response token (EOS counts), in order.

    Works in the shard's own batches, so that a stored teacher and an online one give the same bytes.
    """
    chunk_tokens = tokens_per_chunk(teacher.num_logits, hardware.objective_memory_mb, hardware.device)
    measured: list[ScoredRecord] = []
    for group in shard_batches(shard):
        faults.reached("measure", group[0].id)
        batch = collate(group).to(hardware.device)
        with hardware.autocast():
            ce_N = cross_entropy_per_token(
                teacher.hidden_states(batch),
                teacher.head,
                batch.targets_N,
                num_real_tokens=num_real_tokens,
                chunk_tokens=chunk_tokens,
            )
        lengths = [len(row.response_ids) for row in group]
        measured += [
            ScoredRecord(row.id, len(row.prompt_ids), len(row.response_ids), float(ce_n.mean()))
            for row, ce_n in zip(group, ce_N.cpu().double().split(lengths), strict=True)
        ]
    return measured
