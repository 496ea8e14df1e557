"""The measured columns of scored rows as arrays, refused where a value is missing or not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pocl_cli.errors import ArtifactError, NonFiniteError
from pocl_cli.records import ScoredRecord

Column = Literal["cross_entropy", "rouge_l"]
FloatArray = npt.NDArray[np.float64]

_IDS_SHOWN = 5


def measured(rows: Sequence[ScoredRecord], column: Column) -> FloatArray:
    """Column `column` of `rows`, float64 `[N]`: `cross_entropy` in nats per response token, `rouge_l` F1 in 0..1.

    Raises:
        ArtifactError: the scores lack the column for some row (the model did not generate).
        NonFiniteError: some value is NaN or infinite.
    """
    values = [getattr(row, column) for row in rows]
    missing = [row.id for row, value in zip(rows, values, strict=True) if value is None]
    if missing:
        raise ArtifactError(
            f"{len(missing)} of {len(rows)} rows have no {column}",
            where="the scores",
            why=f"the difficulty needs it; first of them: {listed(missing)}",
            fix="measure the rows again with `pocl score` and the same difficulty",
        )
    array = np.array(values, dtype=np.float64)
    require_finite([row.id for row in rows], array, column)
    return array


def require_finite(ids: Sequence[str], values: FloatArray, quantity: str) -> None:
    """Raises NonFiniteError with the ids of the rows whose `quantity` is NaN or infinite."""
    wrong = [ids[position] for position in np.flatnonzero(~np.isfinite(values)).tolist()]
    if wrong:
        raise NonFiniteError(
            f"{quantity} of {len(wrong)} of {len(ids)} rows is not a finite number",
            where="the difficulty of the training rows",
            why=f"rows {listed(wrong)}",
            fix="look at these rows and at the model that measured them, then run `pocl score` again",
        )


def listed(ids: Iterable[str]) -> str:
    """The first ids, and how many more there are."""
    every = list(ids)
    more = len(every) - _IDS_SHOWN
    return ", ".join(every[:_IDS_SHOWN]) + (f" and {more} more" if more > 0 else "")
