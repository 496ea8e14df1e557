"""A training run, and the same one with its batches shared out among processes and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.parallel import Processes

from .processes import in_processes
from .training import read_consumed, train_lines


def assert_any_split_is_the_same(
    job: Callable[..., TrainingJob], folder: Path, *, size: int, parallel: str, micro_batch: int, **changes: Any
) -> list[dict[str, Any]]:
    """Asserts that every line of a split run has the numbers of one process, to 1e-9; the lines of that one.

    Args:
        job: gives the job in a folder; keywords replace its settings.
        folder: a new one.
        size: number of processes.
        parallel: `ddp` or `fsdp`; not read where there is one process.
        micro_batch: most tokens of a micro-batch.
        changes: for both.
    """
    train(job(folder / "alone", **changes))

    def act(processes: Processes | None = None) -> None:
        split = job(folder / "split", max_tokens_per_micro_batch=micro_batch, **changes)
        train(replace(split, processes=processes) if processes else split)

    if size == 1:
        act()
    else:
        in_processes(size, folder, act, parallel=parallel)
    alone, split = train_lines(folder / "alone"), train_lines(folder / "split")
    assert len(alone) == len(split) > 5
    for one, other in zip(split, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert read_consumed(folder / "split") == read_consumed(folder / "alone")
    return alone
