"""Measured rows as the columns that difficulty measurers get."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pyarrow as pa

from pocl_cli.difficulty.scores import Scores
from pocl_cli.records import ScoredRecord

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),
        ("cross_entropy", pa.float64()),
        ("rouge_l", pa.float64()),
    ]
)


def make_scores(rows: Sequence[ScoredRecord]) -> Scores:
    return Scores(pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA))
