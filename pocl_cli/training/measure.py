"""Cross entropy of given responses under a model, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pocl_cli import faults
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.training.objective import collate, cross_entropy_per_token, tokens_per_chunk
from pocl_cli.training.sampler import micro_batches

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.head import HeadedModel


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
    for group in micro_batches(rows, hardware.max_tokens_per_micro_batch, packs=headed.packs):
        faults.reached("measure", group[0].id)
        batch = collate(group).to(hardware.device)
        with hardware.autocast():
            ce_N = cross_entropy_per_token(
                headed.hidden_states(batch),
                headed.head,
                batch.targets_N,
                num_real_tokens=num_real_tokens,
                chunk_tokens=tokens_per_chunk(headed.num_logits, hardware.objective_memory_mb, hardware.device),
            )
        lengths = [len(row.response_ids) for row in group]
        for row, ce_n in zip(group, ce_N.cpu().double().split(lengths), strict=True):
            measured[row.id] = ScoredRecord(row.id, len(row.prompt_ids), len(row.response_ids), float(ce_n.mean()))
        if advance is not None:
            advance(len(group))
    headed.train(was_training)
    return [measured[row.id] for row in rows]
