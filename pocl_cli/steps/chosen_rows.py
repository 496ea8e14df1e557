"""What a student's artifact says of the rows that its stages were given when they began."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pocl_cli.artifacts import durable
from pocl_cli.curriculum.stage_table import StageRow
from pocl_cli.records import Stage
from pocl_cli.training import checkpoint
from pocl_cli.training.stage_rows import RowChoice

# Every row at the beginning of every stage.
MEASURED = pa.schema(
    [("stage", pa.int32()), ("id", pa.string()), ("cross_entropy", pa.float64()), ("chosen", pa.bool_())]
)


def as_chosen(
    folder: Path, choice: RowChoice, stages: Sequence[Stage], table: Sequence[StageRow]
) -> tuple[list[Stage], list[StageRow]]:
    """The stages with the rows that they were given, and their table, by the last checkpoint in the work folder.

    Leaves `measured.parquet` there: what the rows were chosen by.
    """
    measured = checkpoint.load_measured(checkpoint.newest(folder / "checkpoints"))
    chosen, rows, parts = [], [], []
    for planned, row in zip(stages, table, strict=True):
        stage, values = choice.stage(planned, measured), choice.cross_entropy(planned, measured)
        chosen.append(stage)
        if values is None:
            rows.append(row)
            continue
        members = set(stage.record_ids)
        rows.append(StageRow(**{**row, "max_cross_entropy": max(values[record_id] for record_id in members)}))
        columns = ([stage.index] * len(values), [*values], [*values.values()], [one in members for one in values])
        parts.append(pa.table([*columns], schema=MEASURED))
    durable.write_parquet(folder / "measured.parquet", pa.concat_tables(parts).combine_chunks())
    return chosen, rows
