"""The training loop: what a stage is, what is logged and consumed, and when a step is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from pocl_cli.errors import NonFiniteError
from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.sampler import Sampler

from ...support.training import (
    dev_lines,
    make_job,
    make_student,
    read_consumed,
    read_lines,
    same_weights,
    toy_rows,
    train_lines,
    two_stages,
    weights,
)

# make_job without changes: 12 rows in batches of 4, stages of 6 and 12 rows, 2 epochs each: 4 + 6 steps.
STEPS = [4, 6]


class Recorder:
    """Dev figures that a test chooses, and the weights that they were asked for."""

    def __init__(self, job: TrainingJob, figures: list[tuple[float, float]]) -> None:
        self.figures, self.seen = figures, []
        self.student = job.student

    def __call__(self) -> dict[str, float]:
        rouge_l, cross_entropy = self.figures[len(self.seen)]
        self.seen.append(weights(self.student))
        return {"dev_rouge_l": rouge_l, "dev_cross_entropy": cross_entropy}


def with_figures(job: TrainingJob, figures: list[tuple[float, float]]) -> tuple[TrainingJob, Recorder]:
    recorder = Recorder(job, figures)
    return replace(job, evaluate_dev=recorder), recorder


# ── stages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_second_stage_when_it_starts_then_has_the_first_ones_weights_and_a_fresh_optimizer(tmp_path):
    whole = make_job(tmp_path / "whole")
    first = make_job(tmp_path / "first", max_steps=STEPS[0])
    rows = toy_rows(12)

    train(whole)
    train(first)
    # Stage 1 alone, as a run of its own: nothing but the weights comes from stage 0.
    second = replace(
        make_job(tmp_path / "second", student=first.student),
        stages=[replace(two_stages(rows)[1])],
        table=[replace_row(whole.table[1], stage=1)],
    )
    alone = train_from_stage_one(second)

    assert same_weights(weights(alone.student), weights(whole.student))


def replace_row(row: Any, **changes: Any) -> Any:
    return {**row, **changes}


def train_from_stage_one(job: TrainingJob) -> TrainingJob:
    train(job)
    return job


def test_learning_rate_when_a_stage_starts_then_is_lr_again_and_falls_to_near_its_end(tmp_path):
    train(make_job(tmp_path, lr=4e-3, lr_end=4e-5))

    by_stage = [[line["lr"] for line in train_lines(tmp_path) if line["stage"] == stage] for stage in (0, 1)]
    assert [len(rates) for rates in by_stage] == STEPS
    for rates in by_stage:
        expected = [4e-5 + (4e-3 - 4e-5) * (1 + math.cos(math.pi * i / len(rates))) / 2 for i in range(len(rates))]
        assert rates == pytest.approx(expected, rel=1e-12)
        assert rates[0] == 4e-3


def test_temperature_and_ratio_when_a_stage_trains_then_are_that_stages(tmp_path):
    train(make_job(tmp_path))

    seen = {(line["stage"], line["temperature"], line["kd_ratio"]) for line in train_lines(tmp_path)}
    assert seen == {(0, 1.0, 0.7), (1, 2.0, 1.0)}
    for line in train_lines(tmp_path):
        kd = line["kd"] * line["temperature"] ** 2
        assert line["loss"] == pytest.approx((1 - line["kd_ratio"]) * line["ce"] + line["kd_ratio"] * kd, rel=1e-5)


def test_best_state_when_the_policy_is_best_then_is_handed_on_and_kept(tmp_path):
    figures = [(9.0, 1.0), (5.0, 3.0), (4.0, 1.0), (3.0, 3.0), (3.0, 2.0)]
    job, recorder = with_figures(make_job(tmp_path, keep_best=True, evaluate_every=1), figures)
    handed_on: list[dict[str, torch.Tensor]] = []

    def show(num_steps: int) -> None:
        if len(recorder.seen) == 3 and not handed_on:
            handed_on.append({})  # the first step of stage 1 is over: look at what it started from below

    train(replace(job, show=show))

    # The figures before training belong to no stage. Stage 0 is best after its first epoch; stage 1 ties on ROUGE-L,
    # and its second epoch has the lower cross entropy.
    assert same_weights(weights(job.student), recorder.seen[4])
    assert handed_on


def test_best_state_of_the_first_stage_when_handed_on_then_is_what_the_second_starts_from(tmp_path):
    figures = [(9.0, 1.0), (5.0, 3.0), (4.0, 1.0)]
    best, recorder = with_figures(make_job(tmp_path / "best", keep_best=True, max_steps=STEPS[0]), figures)
    last, _ = with_figures(make_job(tmp_path / "last", keep_best=False, max_steps=STEPS[0]), figures)

    train(best)
    train(last)

    assert same_weights(weights(best.student), recorder.seen[1])
    assert same_weights(weights(last.student), recorder.seen[2])
    assert not same_weights(recorder.seen[1], recorder.seen[2])
