"""The rows of stages that are chosen when they begin, by the student as it then stands (`curriculum.selecting`).

What was measured is carried through the run and saved with every checkpoint; which rows a stage has follows from it.
N rows of the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pocl_cli.log import get_logger
from pocl_cli.records import Stage
from pocl_cli.training.measure import measure_cross_entropy
from pocl_cli.training.shards import Rows, in_shards

if TYPE_CHECKING:
    from pocl_cli.curriculum.selecting import Selecting
    from pocl_cli.models.device import Hardware
    from pocl_cli.training.parallel import Processes
    from pocl_cli.training.student import StudentWithObjective

# The cross entropies of all rows `[N]` at the beginning of every stage so far, in float64, by `_key`.
Measured: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class RowChoice:
    """Chooses the rows of stages.

    Attributes:
        scheduler: says which rows a stage has.
        ids: of all rows.
        measure: the student's cross entropy on each of them, `[N]`, as it stands; the same in every process.
    """

    scheduler: Selecting
    ids: tuple[str, ...]
    measure: Callable[[], Tensor]

    def begin(self, stage: Stage, measured: Measured) -> Measured:
        """With what the student finds easy now, unless the stage has begun before."""
        if _key(stage) in measured:
            return measured
        values_N = self.measure()
        get_logger().info(
            "stage %d: chosen by cross entropy under the student as it stands, mean %.4g of %d rows",
            stage.index, values_N.mean(), len(values_N),
        )  # fmt: skip
        return {**measured, _key(stage): values_N}

    def stage(self, stage: Stage, measured: Measured) -> Stage:
        """The stage with its rows; as it was where it has not begun."""
        if _key(stage) not in measured:
            return stage
        record_ids = self.scheduler.rows_for_stage(stage, self.ids, measured[_key(stage)].numpy())
        assert len(record_ids) == len(stage.record_ids), "a stage's number of rows is known beforehand"
        return replace(stage, record_ids=record_ids)

    def cross_entropy(self, stage: Stage, measured: Measured) -> dict[str, float] | None:
        """What the stage's rows were chosen by, of every row; None where it has not begun."""
        if _key(stage) not in measured:
            return None
        return dict(zip(self.ids, measured[_key(stage)].tolist(), strict=True))


def measure_rows(student: StudentWithObjective, rows: Rows, *, hardware: Hardware, processes: Processes) -> Tensor:
    """The student's cross entropy on every row `[N]`, in nats per response token; each process measures some shards.

    Raises:
        NonFiniteError: that of a row is not finite.
        WorkerError: another of the processes is gone.
    """
    places = {row_id: place for place, row_id in enumerate(rows.ids)}
    measured_N = torch.zeros(len(places), dtype=torch.float64)
    for shard in in_shards(rows)[processes.rank :: processes.size]:
        measured = measure_cross_entropy(
            student.headed,
            [rows.row(row_id) for row_id in shard],
            num_real_tokens=student.num_real_tokens,
            hardware=hardware,
        )
        for row in measured:
            measured_N[places[row.id]] = row.cross_entropy
    return processes.sum(measured_N)


def _key(stage: Stage) -> str:
    return f"{stage.index:03d}"
