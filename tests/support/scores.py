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
        ("cross_entropy_alone", pa.float64()),
    ]
)
TEACHERS_CROSS_ENTROPY = 0.5


def make_scores(rows: Sequence[ScoredRecord]) -> Scores:
    """Columns of `rows`, and a teacher and an attention to which all rows are the same."""
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)
    theirs = pa.array([TEACHERS_CROSS_ENTROPY] * len(rows), pa.float64())
    return Scores(table.append_column("teacher_cross_entropy", theirs).append_column("attention_variance", theirs))
