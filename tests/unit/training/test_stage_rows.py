"""Stages whose rows the student chooses when they begin: what is chosen, by any number of processes, after any stop."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocl_cli.curriculum.self_paced import SelfPaced
from pocl_cli.records import Subset
from pocl_cli.registry import schedulers
from pocl_cli.training import checkpoint, shards
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.measure import measure_cross_entropy
from pocl_cli.training.parallel import ALONE, Processes
from pocl_cli.training.stage_rows import RowChoice, measure_rows

from ...support.aborts import Aborted, abort_after
from ...support.processes import in_processes
from ...support.training import HARDWARE, RowsById, make_job, make_student, read_consumed, toy_rows

ROWS = toy_rows(12)
IDS = tuple(row.id for row in ROWS)
RAMP = {"start": 1, "end": 1}


def scheduler(**changes: Any) -> SelfPaced:
    values = {"name": "self_paced", "stages": 3, "epochs_per_stage": 2, "pacing": "linear", "initial": 1 / 3}
    member: SelfPaced = schedulers.build({**values, "temperature": RAMP, "kd_ratio": RAMP, **changes})
    return member


def self_paced_job(folder: Path, **changes: Any) -> TrainingJob:
    """4, 8 and 12 of 12 rows, twice each: 2 + 4 + 6 steps, with dropout and the best state handed on."""
    chooses = scheduler()
    student = make_student(dropout=0.1)
    stages = chooses([Subset(0, IDS)])
    job = make_job(
        folder, student=student, rows=ROWS, stages=stages, evaluates=True, keep_best=True, checkpoint_every=1, **changes
    )
    measure = partial(measure_rows, student, RowsById(ROWS), hardware=HARDWARE, processes=ALONE)
    return replace(job, choice=RowChoice(chooses, IDS, measure))


def left(folder: Path) -> list[bytes]:
    newest = checkpoint.newest(folder / "checkpoints")
    files = (newest / "model.safetensors", newest / "measured.safetensors", folder / "consumed.parquet")
    return [path.read_bytes() for path in files]


def test_stage_when_it_begins_then_has_the_rows_that_the_student_of_that_moment_finds_easiest(tmp_path: Path) -> None:
    job = self_paced_job(tmp_path)
    before = measure_cross_entropy(
        job.student.headed, ROWS, num_real_tokens=job.student.num_real_tokens, hardware=HARDWARE
    )

    train(job)

    measured = checkpoint.load_measured(checkpoint.newest(tmp_path / "checkpoints"))
    assert sorted(measured) == ["000", "001", "002"]
    assert measured["000"].tolist() == pytest.approx([row.cross_entropy for row in before], rel=1e-5)
    consumed = read_consumed(tmp_path)
    for stage, size in enumerate((4, 8, 12)):
        easiest = np.argsort(measured[f"{stage:03d}"].numpy())[:size]
        assert {row["id"] for row in consumed if row["stage"] == stage} == {IDS[place] for place in easiest}
    orders = [np.argsort(values.numpy()).tolist() for values in measured.values()]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("steps", [(1,), (2,), (2, 1, 3), (3,), (6, 2), (11,)])
def test_run_when_stopped_at_any_step_then_goes_on_with_the_same_rows_to_the_same_bytes(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    train(self_paced_job(tmp_path / "whole"))

    for step in steps:
        with suppress(Aborted):
            train(replace(self_paced_job(tmp_path / "cut"), show=abort_after(step)))
    train(self_paced_job(tmp_path / "cut"))

    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_run_when_what_its_rows_were_chosen_by_is_damaged_then_goes_on_from_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    train(self_paced_job(tmp_path / "whole"))
    with pytest.raises(Aborted):
        train(replace(self_paced_job(tmp_path / "cut"), show=abort_after(5)))
    path = checkpoint.newest(tmp_path / "cut" / "checkpoints") / "measured.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))

    train(self_paced_job(tmp_path / "cut"))

    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_rows_when_measured_by_any_number_of_processes_then_have_the_same_bits_in_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 3)
    student, rows = make_student(), RowsById(ROWS)

    def measured(processes: Processes) -> torch.Tensor:
        return measure_rows(student, rows, hardware=HARDWARE, processes=processes)

    alone = measured(ALONE)
    assert len(set(alone.tolist())) == len(IDS)
    for size in (2, 3, 5):

        def same(processes: Processes) -> None:
            assert torch.equal(measured(processes), alone)

        in_processes(size, tmp_path / "meetings", same)
