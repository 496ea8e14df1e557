"""The curriculum audit: whether a run trained on the rows that its stage table says, as often as it says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from pocl_cli.curriculum.stage_table import StageRow, steps_per_epoch
from pocl_cli.errors import ArtifactError
from pocl_cli.records import Stage, Subset

if TYPE_CHECKING:
    import pyarrow as pa

IntArray = npt.NDArray[np.int64]
_SHOWN = 5


class StageAudit(TypedDict):
    """What one stage consumed: its optimizer steps, the subsets its rows are from, and how often rows were seen.

    `num_rows` counts different rows; `times` are the fewest and the most times that a row of the stage was seen in it.
    """

    stage: int
    steps: int
    subsets: list[int]
    num_rows: int
    times: list[int]


def audit(
    consumed: pa.Table,
    stages: Sequence[Stage],
    table: Sequence[StageRow],
    subsets: Sequence[Subset],
    *,
    global_batch_size: int,
    drop_last: bool,
) -> list[StageAudit]:
    """Compares what was consumed with the stage table. Says what each stage used that made steps.

    Args:
        consumed: `stage`, `epoch` (from 0), `step` (from 1) and `id` of every row of every global batch, in order.
        stages: of the run.
        table: its stage table.
        subsets: the partition.
        global_batch_size: sequences per optimizer step.
        drop_last: whether partial batches were left out.

    Raises:
        ArtifactError: a step, an epoch or a row is missing, too many, or in another place than the table says.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    known = pa.array([record_id for subset in subsets for record_id in subset.record_ids], pa.string())
    subset_of = np.repeat([subset.index for subset in subsets], [len(subset.record_ids) for subset in subsets])
    ids = consumed["id"]
    places = pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy().astype(np.int64)
    if np.any(places < 0):
        unknown = ids.filter(pa.array(places < 0)).to_pylist()
        raise _differs(f"{len(unknown)} draws are of rows outside the partition: {_listed(sorted(set(unknown)))}")
    labels = {name: consumed[name].to_numpy() for name in ("stage", "epoch", "step")}
    _check_labels(labels, _expected(table, global_batch_size, drop_last))

    audits = []
    for stage, row in zip(stages, table, strict=True):
        if row["steps"] == 0:
            continue
        drawn = places[labels["stage"] == stage.index]
        members = pc.index_in(pa.array(stage.record_ids, pa.string()), value_set=known).to_numpy().astype(np.int64)
        seen = np.bincount(drawn, minlength=len(known))
        strangers = np.setdiff1d(drawn, members)
        if strangers.size:
            raise _differs(
                f"stage {stage.index} saw {strangers.size} rows of other stages (subsets"
                f" {np.unique(subset_of[strangers]).tolist()}): {_listed(known.take(strangers[:_SHOWN]).to_pylist())}"
            )
        draws = labels["epoch"][labels["stage"] == stage.index] * len(known) + drawn
        if stage.times is None and len(np.unique(draws)) < len(draws):
            raise _differs(f"stage {stage.index} saw a row twice in one epoch")
        least, most = _allowed_times(stage, row, global_batch_size, drop_last)
        wrong = np.flatnonzero((seen[members] < least) | (seen[members] > most))
        if wrong.size:
            first = wrong[0]
            raise _differs(
                f"stage {stage.index} saw {wrong.size} of its rows too often or too seldom: row"
                f" {stage.record_ids[first]} {seen[members[first]]} times, where the table says"
                f" {least[first]}{f' to {most[first]}' if most[first] != least[first] else ''}"
            )
        audits.append(
            StageAudit(
                stage=stage.index,
                steps=row["steps"],
                subsets=np.unique(subset_of[drawn]).tolist(),
                num_rows=int(np.count_nonzero(seen)),
                times=[int(seen[members].min()), int(seen[members].max())],
            )
        )
    return audits


def steps_made(consumed: pa.Table) -> dict[int, int]:
    """The optimizer steps of every stage, by what was consumed."""
    pairs = np.unique(np.stack([consumed["stage"].to_numpy(), consumed["step"].to_numpy()]), axis=1)
    return dict(zip(*(part.tolist() for part in np.unique(pairs[0], return_counts=True)), strict=True))


def _expected(table: Sequence[StageRow], global_batch_size: int, drop_last: bool) -> dict[str, IntArray]:
    """Stage, epoch and step of every draw, by the table alone."""
    columns: dict[str, list[IntArray]] = {"stage": [], "epoch": [], "step": []}
    before = 0
    for row in table:
        per_epoch = steps_per_epoch(row["num_rows"], global_batch_size, drop_last)
        steps = np.arange(row["steps"])
        sizes = np.minimum(global_batch_size, row["num_rows"] - steps % per_epoch * global_batch_size)
        columns["stage"].append(np.full(sizes.sum(), row["stage"]))
        columns["epoch"].append(np.repeat(steps // per_epoch, sizes))
        columns["step"].append(np.repeat(before + steps + 1, sizes))
        before += row["steps"]
    return {name: np.concatenate(values) for name, values in columns.items()}


def _check_labels(labels: dict[str, IntArray], expected: dict[str, IntArray]) -> None:
    for step, (found, wanted) in enumerate(
        itertools.zip_longest(*(np.bincount(one["step"])[1:].tolist() for one in (labels, expected)), fillvalue=0), 1
    ):
        if found != wanted:
            raise _differs(f"step {step} has {found} rows, where the table says {wanted}")
    for name, values in expected.items():
        differing = np.flatnonzero(labels[name] != values)
        if differing.size:
            place = differing[0]
            raise _differs(
                f"row {place} of the file (step {labels['step'][place]}) is of {name} {labels[name][place]}, where the"
                f" table says {values[place]}"
            )


def _allowed_times(stage: Stage, row: StageRow, global_batch_size: int, drop_last: bool) -> tuple[IntArray, IntArray]:
    """The fewest and the most times that the stage may have seen each of its rows, `[rows]` each.

    They differ where an epoch is not whole: batches were dropped, or the run stopped inside it.
    """
    per_epoch = steps_per_epoch(row["num_rows"], global_batch_size, drop_last)
    begun = -(-row["steps"] // per_epoch)
    whole = row["steps"] // per_epoch
    if drop_last and row["num_rows"] % global_batch_size:
        whole = 0
    if stage.times is None:
        times = np.ones(row["num_rows"], dtype=np.int64)
        return whole * times, begun * times
    in_all = np.array(stage.times, dtype=np.int64)
    return in_all * (whole // stage.epochs), in_all * -(-begun // stage.epochs)


def _differs(why: str) -> ArtifactError:
    return ArtifactError(
        "the run did not train on the rows of its stage table",
        where="consumed.parquet",
        why=why,
        fix="this is a fault of the training loop or of the disk: keep the folder for a report, and train afresh",
    )


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
