"""The stage table: rows, epochs and optimizer steps of every stage, known before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from pocl_cli.curriculum.learning_rate import learning_rates
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import Stage


class _PlannedRow(TypedDict):
    stage: int
    num_rows: int
    epochs: int
    steps: int
    temperature: float
    kd_ratio: float
    lr: float


class StageRow(_PlannedRow, total=False):
    """One entry of `stages.json`. `lr` is the stage's first learning rate, `steps` its optimizer steps.

    `max_cross_entropy` is that of the hardest of its rows, where they were chosen by it when the stage began; `teacher`
    the short name of the stage's, where the stages have different ones.
    """

    max_cross_entropy: float
    teacher: str


def steps_per_epoch(num_rows: int, global_batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of one pass over `num_rows` rows; `drop_last` leaves out the partial batch."""
    return num_rows // global_batch_size if drop_last else math.ceil(num_rows / global_batch_size)


def stage_steps(stage: Stage, *, global_batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of all epochs of `stage`, before any `max_steps`.

    Raises:
        DataError: the stage has no rows.
        ConfigError: with `drop_last` it has fewer rows than a batch, so that nothing would be trained.
    """
    num_rows = len(stage.record_ids)
    if num_rows == 0:
        raise DataError(f"no rows to train on in stage {stage.index}", fix="check dataset.path and dataset.limit")
    per_epoch = steps_per_epoch(num_rows, global_batch_size, drop_last)
    if per_epoch == 0:
        raise ConfigError(
            f"stage {stage.index} would make no step",
            where="train.drop_last",
            why=f"it has {num_rows} rows, a batch has {global_batch_size}, and partial batches are dropped",
            fix=f"set train.drop_last=false, train.global_batch_size={num_rows} or less, or fewer curriculum.stages",
        )
    return stage.epochs * per_epoch


def stage_table(
    stages: Sequence[Stage],
    *,
    global_batch_size: int,
    drop_last: bool,
    lr: float,
    lr_end: float,
    max_steps: int | None,
) -> list[StageRow]:
    """The rows of `stages.json`, with the steps that will be made.

    `max_steps` n is exactly n steps where there is one stage (its rows are gone through as often as that takes), else
    a stop after n steps in all: the stage in which it falls is cut, later ones have 0 steps. `epochs`
    counts an epoch that is cut as one.

    Raises:
        DataError: a stage has no rows.
        ConfigError: with `drop_last` a stage has fewer rows than a batch.
    """
    full = [stage_steps(stage, global_batch_size=global_batch_size, drop_last=drop_last) for stage in stages]
    made = _limited(full, max_steps)
    rates = learning_rates(stages, made if len(full) == 1 else full, start=lr, end=lr_end)
    return [
        StageRow(
            stage=stage.index,
            num_rows=len(stage.record_ids),
            epochs=math.ceil(steps / steps_per_epoch(len(stage.record_ids), global_batch_size, drop_last)),
            steps=steps,
            temperature=stage.temperature,
            kd_ratio=stage.kd_ratio,
            lr=rate.at(0) if rate.before else lr,
        )
        for stage, steps, rate in zip(stages, made, rates, strict=True)
    ]


def table_as_made(
    stages: Sequence[Stage],
    table: Sequence[StageRow],
    num_steps: Mapping[int, int],
    *,
    global_batch_size: int,
    drop_last: bool,
) -> list[StageRow]:
    """The table with the steps that stages made which ended early, as far as their rules allow them to.

    Args:
        stages: of the run.
        table: its stage table.
        num_steps: the optimizer steps that each stage made.
        global_batch_size: sequences per optimizer step.
        drop_last: whether partial batches were left out.
    """
    made = []
    for stage, row in zip(stages, table, strict=True):
        epochs, rest = divmod(
            num_steps.get(stage.index, 0), steps_per_epoch(row["num_rows"], global_batch_size, drop_last)
        )
        rule = stage.convergence
        early = rule is not None and not rest and rule.min_epochs <= epochs < row["epochs"]
        made.append(StageRow(**{**row, "epochs": epochs, "steps": num_steps[stage.index]}) if early else row)
    return made


def _limited(full: list[int], max_steps: int | None) -> list[int]:
    if max_steps is None:
        return full
    if len(full) == 1:
        return [max_steps]
    before = [sum(full[:index]) for index in range(len(full))]
    return [min(steps, max(0, max_steps - done)) for steps, done in zip(full, before, strict=True)]
