"""Schedulers that choose the rows of a stage when it begins, by what the student then finds easy.

How many rows a stage has, and all else of it, is known before the first step; which rows they are is known once its
turn has come. Training measures the student then and asks. It sees no scheduler's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from pocl_cli.records import Stage

FloatArray: TypeAlias = npt.NDArray[np.float64]


@runtime_checkable
class Selecting(Protocol):
    """What a scheduler has beside its stages where their rows depend on the student.

    The stages that it gives beforehand have as many rows as they will have, but any.
    """

    def rows_for_stage(self, stage: Stage, ids: Sequence[str], cross_entropy: FloatArray) -> tuple[str, ...]:
        """The rows of a stage that begins; a pure function, so that a run which resumes gives the same bytes.

        Args:
            stage: as it was given beforehand.
            ids: of all N rows.
            cross_entropy: of the student as it stands, `[N]`, in nats per response token.
        """
        ...


def selecting(scheduler: Any) -> Selecting | None:
    """The scheduler where it chooses rows; None where its stages are what is trained on."""
    return scheduler if isinstance(scheduler, Selecting) else None
