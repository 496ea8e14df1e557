"""How a model spreads its attention on the responses of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocl_cli import faults
from pocl_cli.models.attention_weights import attention_variances
from pocl_cli.records import AttentionRecord, TokenisedRow
from pocl_cli.training.objective import collate
from pocl_cli.training.shards import shard_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocl_cli.models.device import Hardware


def measure_attention(
    model: PreTrainedModel, shard: Sequence[TokenisedRow], *, hardware: Hardware
) -> list[AttentionRecord]:
    """The attention variance of each row of a shard (`training.shards`), mean over its response tokens, in order.

    That of a response token is the one of the token before it, from which it is predicted. The model is in evaluation
    mode.

    Raises:
        ConfigError: the architecture gives no attention weights.
    """
    measured: list[AttentionRecord] = []
    for group in shard_batches(shard):
        faults.reached("measure", group[0].id)
        with hardware.autocast():
            variance_N = attention_variances(model, collate(group).to(hardware.device))
        of_rows = variance_N.cpu().split([len(row.response_ids) for row in group])
        measured += [
            AttentionRecord(row.id, len(row.prompt_ids), len(row.response_ids), float(variance_n.mean()))
            for row, variance_n in zip(group, of_rows, strict=True)
        ]
    return measured
