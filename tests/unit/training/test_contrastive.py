"""Steps on the stored answers of teacher and student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_cli.losses.on_policy import Part
from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.objective import collate
from pocl_cli.training.student import StudentWithObjective

from ...support.splits import assert_any_split_is_the_same
from ...support.training import (
    make_answers,
    make_job,
    make_student,
    read_consumed,
    toy_rows,
    train_lines,
    two_stages,
)

ANSWERS = {who: make_answers(who, toy_rows(12)) for who in ("teacher", "student")}


def contrastive_student(**changes: Any) -> StudentWithObjective:
    student = make_student("distillm2", dtype=torch.float64)
    student.method = replace(student.method, **changes)  # type: ignore[type-var]
    return student


def job(folder: Path, student: StudentWithObjective | None = None, **changes: Any) -> TrainingJob:
    return make_job(folder, student=student or contrastive_student(), global_batch_size=3, **changes)


def loss_by_hand(rows: list[TokenisedRow], temperature: float, method: Any = None) -> float:
    """The mean over the tokens of a part's rows: of a divergence, or of cross entropy."""
    student = contrastive_student()
    output = student(
        collate(rows),
        temperature=temperature,
        kd_ratio=1.0 if method else 0.0,
        normaliser=sum(len(row.response_ids) for row in rows),
        method=method,
    )
    return float(output.loss.detach())


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
def test_loss_when_a_step_is_made_then_weighs_each_divergence_on_its_own_answers(
    tmp_path: Path, kd_ratio: float
) -> None:
    rows, temperature = toy_rows(12), 4 / 3
    stage = Stage(0, tuple(row.id for row in rows), 1, temperature, kd_ratio)
    run = job(tmp_path, stages=[stage], lr=1e-12, lr_end=1e-12)

    train(run)

    for line in train_lines(tmp_path):
        gold = [run.rows.row(one["id"]) for one in read_consumed(tmp_path) if one["step"] == line["step"]]
        theirs, own = ([ANSWERS[who].row(row.id) for row in gold] for who in ("teacher", "student"))
        weight = 1 + 0.5 * min(1, 2 * (line["step"] - 1) / 4)
        forward, reverse = (
            loss_by_hand(rows, temperature, kd_methods.build({"name": name, "alpha": 0.1, "t_squared": True}))
            for name, rows in (("sfkl", theirs), ("srkl", own))
        )
        expected = kd_ratio * ((2 - weight) * forward + weight * reverse)
        if kd_ratio < 1:
            expected += (1 - kd_ratio) * loss_by_hand(gold, temperature)
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
        counted = [*theirs, *own, *(gold if kd_ratio < 1 else [])]
        before = [one for one in train_lines(tmp_path) if one["step"] == line["step"] - 1]
        assert line["num_tokens"] - sum(one["num_tokens"] for one in before) == sum(
            len(row.response_ids) for row in counted
        )


def test_weights_when_the_run_goes_on_then_the_students_rises_to_its_end_at_half_of_the_steps() -> None:
    method: Any = contrastive_student(student_weight_end=1.5).method
    parts = [method.rows_for_step(1, 0, progress, {}, 1.0) for progress in (0.0, 0.25, 0.5, 0.9)]
    assert [[part.weight for part in of_step] for of_step in parts] == [
        [1.0, 1.0, 0.0],
        [0.75, 1.25, 0.0],
        [0.5, 1.5, 0.0],
        [0.5, 1.5, 0.0],
    ]
    constant: Any = contrastive_student(student_weight_end=1.0).method
    assert [part.weight for part in constant.rows_for_step(1, 9, 0.9, {}, 0.5)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("size", "parallel", "micro_batch"), [(2, "ddp", 4096), (3, "fsdp", 60)])
def test_losses_and_gradient_norms_when_split_in_any_way_then_are_those_of_one_process(
    tmp_path: Path, size: int, parallel: str, micro_batch: int
) -> None:
    assert_any_split_is_the_same(
        job, tmp_path, size=size, parallel=parallel, micro_batch=micro_batch, stages=two_stages(toy_rows(12))
    )


def test_seqkd_when_it_chooses_rows_then_asks_for_cross_entropy_on_the_teachers_answers_alone() -> None:
    method: Any = make_student("seqkd").method
    assert method.rows_for_step(1, 0, 0.5, {}, 0.7) == (Part("teacher", 0.0),)
