"""The stages of a run before it has its rows: what a plan shows, and what a comparison matches. Free of torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocl_cli.curriculum.partition import cut
from pocl_cli.curriculum.stage_table import StageRow, stage_table
from pocl_cli.data.sources import load_dataset
from pocl_cli.data.split import split_dev
from pocl_cli.records import Subset
from pocl_cli.steps.partition import read_partition
from pocl_cli.steps.result import obtain

if TYPE_CHECKING:
    from pocl_cli.artifacts.manifest import Artifact
    from pocl_cli.records import Record, Stage
    from pocl_cli.schema import PoclConfig, TrainConfig
    from pocl_cli.steps.chain import Chain


def planned_stages(chain: Chain, num_rows: int) -> list[Stage]:
    """The stages of a chain's student over so many training rows, with their places instead of record ids."""
    ids = [str(number) for number in range(num_rows)]
    parts = _parts(chain, num_rows)
    subsets = [Subset(index, tuple(ids[part.start : part.stop])) for index, part in enumerate(parts)]
    stages: list[Stage] = chain.config.curriculum(subsets)
    return stages


def planned_table(chain: Chain, num_rows: int) -> list[StageRow]:
    """The stage table of a chain's student over so many training rows."""
    return with_teachers(chain, stages_of(chain.config.train, planned_stages(chain, num_rows)))


def stages_of(config: TrainConfig, stages: Sequence[Stage]) -> list[StageRow]:
    """The stage table under the `train` section."""
    return stage_table(
        stages,
        global_batch_size=config.global_batch_size,
        drop_last=config.drop_last,
        lr=config.lr,
        lr_end=config.lr_end,
        max_steps=config.max_steps,
    )


def with_teachers(chain: Chain, table: list[StageRow]) -> list[StageRow]:
    """The table with the name of each stage's teacher, where the stages have different ones."""
    if not chain.lessons:
        return table
    names = [lesson.config.teacher.name for lesson in chain.lessons]
    return [StageRow(**{**row, "teacher": name}) for row, name in zip(table, names, strict=True)]


def _parts(chain: Chain, num_rows: int) -> Sequence[range]:
    """The subsets as far as their sizes go. Borders in the difficulty are known once the partition is made."""
    config = chain.config
    if not config.curriculum.needs_partition:
        return [range(num_rows)]
    if config.partition.by == "counts":
        return cut(num_rows, config.curriculum.stages)
    partition = obtain(chain.run, "partition", chain.partition_key, chain.store)
    ends = [0, *itertools.accumulate(len(subset.record_ids) for subset in read_partition(chain.store, partition))]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def training_records(config: PoclConfig) -> Sequence[Record]:
    """The rows of the data set that are not dev rows; tokenising may drop some of them."""
    return split_dev(load_dataset(config.dataset).records, config.dataset.dev_size, config.dataset.seed)[0]


def num_partitioned_rows(partition: Artifact) -> int:
    """How many rows a partition holds: those that are left after tokenising."""
    summary = json.loads((partition.path / "summary.json").read_text(encoding="utf-8"))
    return sum(subset["num_rows"] for subset in summary["subsets"])
