"""The measured rows as columns, refused where a value that is asked for is missing or not finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pocl_cli.errors import ArtifactError, NonFiniteError

if TYPE_CHECKING:
    import pyarrow as pa

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_IDS_SHOWN = 5
# Ids that are Python strings at one time: ten million of them would take most of a GB.
_IDS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Scores:
    """What the student's measurements say about the rows of a data set, N rows, and the teacher's where they are asked.

    Args:
        table: a row each: `id`, distinct strings, and any of the columns of the student's `scores.parquet`; those of
            the teacher's have `teacher_` before their names.
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def ids(self) -> pa.ChunkedArray:
        """Record ids `[N]`."""
        return self.table["id"]

    def each_id(self) -> Iterator[str]:
        """The record ids in their order, as Python strings."""
        for start in range(0, len(self), _IDS_AT_ONCE):
            yield from self.ids.slice(start, _IDS_AT_ONCE).to_pylist()

    def column(self, name: str) -> FloatArray:
        """Column `name`, `[N]`: `cross_entropy` in nats per response token, `rouge_l` F1 in 0..1, or a count.

        Raises:
            ArtifactError: there is no such column, or it lacks a value (the model did not generate).
            NonFiniteError: some value is NaN or infinite.
        """
        if name not in self.table.column_names:
            raise ArtifactError(
                f"no column {name!r}",
                where="the scores",
                why=f"the difficulty needs it; there are {', '.join(self.table.column_names)}",
                fix="correct the difficulty measurer's `needs`",
            )
        column = self.table[name]
        if column.null_count:
            raise ArtifactError(
                f"{column.null_count} of {len(self)} rows have no {name}",
                where="the scores",
                why=f"the difficulty needs it; first of them: {listed(self.ids, column.is_null().to_numpy())}",
                fix="measure the rows again with `pocl score` and the same difficulty",
            )
        values: FloatArray = column.to_numpy().astype(np.float64, copy=False)
        require_finite(self.ids, values, name)
        return values


def require_finite(ids: pa.ChunkedArray, values: FloatArray, quantity: str) -> None:
    """Raises NonFiniteError with the ids of the rows whose `quantity` is NaN or infinite."""
    finite = np.isfinite(values)
    if not finite.all():
        raise NonFiniteError(
            f"{quantity} of {np.count_nonzero(~finite)} of {len(ids)} rows is not a finite number",
            where="the difficulty of the training rows",
            why=f"rows {listed(ids, ~finite)}",
            fix="look at these rows and at the model that measured them, then run `pocl score` again",
        )


def listed(ids: pa.ChunkedArray, chosen: BoolArray) -> str:
    """The first ids of the chosen rows, and how many more there are."""
    positions = np.flatnonzero(chosen)
    more = len(positions) - _IDS_SHOWN
    return ", ".join(ids.take(positions[:_IDS_SHOWN]).to_pylist()) + (f" and {more} more" if more > 0 else "")
