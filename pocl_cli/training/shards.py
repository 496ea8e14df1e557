"""All rows of a data set in fixed shards, and each shard in fixed batches: what is measured or computed once.

Both are a pure function of the rows, so what is computed from a shard does not depend on who asked first, nor on the
size of a micro-batch that somebody's hardware allows. Change a number here, and the versions of what is made rise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pocl_cli.records import TokenisedRow
from pocl_cli.training.sampler import micro_batches

SHARD_ROWS = 128
# Padded tokens of one forward pass without gradients: about what any device holds that holds the model, as no layer
# keeps its activations. A row that is longer is a batch of its own.
TOKENS_PER_BATCH = 4096


class Rows(Protocol):
    """Tokenised rows by record id."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    def row(self, row_id: str) -> TokenisedRow: ...

    def num_tokens(self, row_id: str) -> int: ...


def in_shards(rows: Rows) -> list[tuple[str, ...]]:
    """The record ids by length, then by id, cut after every `SHARD_ROWS`."""
    ordered = sorted(rows.ids, key=lambda row_id: (rows.num_tokens(row_id), row_id))
    return [tuple(ordered[start : start + SHARD_ROWS]) for start in range(0, len(ordered), SHARD_ROWS)]


def shard_batches(shard: Sequence[TokenisedRow]) -> list[list[TokenisedRow]]:
    """The rows of a shard in the batches in which a model reads them, in the shard's order."""
    return micro_batches(shard, TOKENS_PER_BATCH)


def shard_hash(shard: Sequence[TokenisedRow]) -> str:
    """The sha256 over record ids and token ids, in hex: prompt and response apart."""
    digest = hashlib.sha256()
    for row in shard:
        digest.update(f"{row.id}\n{len(row.prompt_ids)} {len(row.response_ids)}\n".encode())
        digest.update(np.asarray([*row.prompt_ids, *row.response_ids], dtype="<i8").tobytes())
    return digest.hexdigest()
