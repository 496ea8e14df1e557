"""The stages of a run before it has its rows: what a plan shows, and what a comparison matches. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocl_cli.curriculum.partition import cut
from pocl_cli.curriculum.stage_table import StageRow, stage_table
from pocl_cli.data.sources import load_dataset
from pocl_cli.data.split import split_dev
from pocl_cli.records import Subset

if TYPE_CHECKING:
    from pocl_cli.artifacts.manifest import Artifact
    from pocl_cli.records import Record
    from pocl_cli.schema import PoclConfig


def planned_table(config: PoclConfig, num_rows: int) -> list[StageRow]:
    """The stage table of a run over so many training rows."""
    ids = [str(number) for number in range(num_rows)]
    parts = cut(num_rows, config.curriculum.stages) if config.curriculum.needs_partition else [range(num_rows)]
    subsets = [Subset(index, tuple(ids[part.start : part.stop])) for index, part in enumerate(parts)]
    return stage_table(
        config.curriculum(subsets),
        global_batch_size=config.train.global_batch_size,
        drop_last=config.train.drop_last,
        lr=config.train.lr,
        max_steps=config.train.max_steps,
    )


def training_records(config: PoclConfig) -> Sequence[Record]:
    """The rows of the data set that are not dev rows; tokenising may drop some of them."""
    return split_dev(load_dataset(config.dataset).records, config.dataset.dev_size, config.dataset.seed)[0]


def num_partitioned_rows(partition: Artifact) -> int:
    """How many rows a partition holds: those that are left after tokenising."""
    summary = json.loads((partition.path / "summary.json").read_text(encoding="utf-8"))
    return sum(subset["num_rows"] for subset in summary["subsets"])
