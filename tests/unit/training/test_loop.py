"""The training loop: what a stage is, what is logged and consumed, when a step is refused, how a signal ends it."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from pocl_cli import faults
from pocl_cli.errors import Interrupted, NonFiniteError
from pocl_cli.losses.divergence import KDMethod
from pocl_cli.losses.evolving import MethodState
from pocl_cli.models.head import HeadedModel
from pocl_cli.records import Convergence, Stage, TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.sampler import Sampler
from pocl_cli.training.state import TrainingState

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

# make_job without changes: 12 rows in batches of 4, stages of 6 and 12 rows, 2 epochs each: 4 + 6 steps, and dev
# evaluations after steps 0, 2, 4 (stage 0), 7 and 10 (stage 1).
STEPS = [4, 6]


class ChosenFigures:
    """Dev figures that a test chooses, and the student's weights at each evaluation."""

    def __init__(self, job: TrainingJob, figures: list[tuple[float, float]]) -> None:
        self.student, self.figures = job.student, figures
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, stage: int) -> dict[str, float]:
        rouge_l, cross_entropy = self.figures[len(self.seen)]
        self.seen.append(weights(self.student))
        return {"dev_rouge_l": rouge_l, "dev_cross_entropy": cross_entropy}


def train_with_figures(folder: Path, figures: list[tuple[float, float]], **changes: Any) -> ChosenFigures:
    job = make_job(folder, **changes)
    chosen = ChosenFigures(job, figures)
    train(replace(job, evaluate_dev=chosen))
    return chosen


def after_step(step: int, act: Callable[[], None]) -> Callable[..., None]:
    """A `show` that acts when so many steps are done."""
    done = 0

    def show(num_steps: int, *more: object) -> None:
        nonlocal done
        done += num_steps
        if done == step:
            act()

    return show


# ── stages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_second_stage_when_it_starts_then_has_the_firsts_weights_and_nothing_else_of_it(tmp_path):
    whole, first = make_job(tmp_path / "whole"), make_job(tmp_path / "first", max_steps=STEPS[0])
    train(whole)
    train(first)
    # Stage 1 as a run of its own has a fresh optimizer and schedule.
    alone = replace(make_job(tmp_path / "alone", student=first.student), stages=whole.stages[1:], table=whole.table[1:])

    train(alone)

    assert same_weights(weights(alone.student), weights(whole.student))


# Epoch by epoch; step 0 belongs to no stage.
FIRST_STAGE = [(9.0, 9.0), (5.0, 3.0), (6.0, 2.0), (6.0, 1.0), (5.5, 0.5)]
SECOND_STAGE = [(1.0, 4.0), (2.0, 4.0), (3.0, 4.0), (4.0, 4.0)]


@pytest.mark.parametrize(
    ("metric", "patience", "min_epochs", "epochs"),
    [
        ("dev_rouge_l", 1, 1, (3, 4)),
        ("dev_rouge_l", 2, 1, (4, 4)),
        ("dev_rouge_l", 1, 4, (4, 4)),
        ("dev_cross_entropy", 1, 1, (4, 2)),
        ("dev_cross_entropy", 3, 1, (4, 4)),
    ],
)
def test_stage_when_dev_figures_no_longer_improve_then_ends_within_its_bounds(
    tmp_path, metric, patience, min_epochs, epochs
):
    rule = Convergence(metric=metric, patience=patience, min_epochs=min_epochs)
    stages = [replace(stage, convergence=rule) for stage in two_stages(toy_rows(12), epochs=4)]
    job = make_job(tmp_path, stages=stages)
    figures = [*FIRST_STAGE[: 1 + epochs[0]], *SECOND_STAGE]
    state = train(replace(job, evaluate_dev=ChosenFigures(job, figures)))

    made = [{line["epoch"] for line in read_consumed(tmp_path) if line["stage"] == stage} for stage in (0, 1)]
    assert [len(one) for one in made] == list(epochs)
    assert state.step == 2 * epochs[0] + 3 * epochs[1]
    assert state == TrainingState(state.step, 2, 0, state.num_tokens, state.metrics_bytes)


def test_stage_when_it_converges_then_its_best_state_is_handed_on(tmp_path):
    rule = Convergence(metric="dev_rouge_l", patience=2, min_epochs=1)
    stages = [replace(stage, convergence=rule) for stage in two_stages(toy_rows(12), epochs=4)]
    job = make_job(tmp_path, stages=stages, keep_best=True)
    chosen = ChosenFigures(job, [(9.0, 9.0), (5.0, 1.0), (4.0, 1.0), (3.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0)])
    train(replace(job, evaluate_dev=chosen))

    assert [line["step"] for line in dev_lines(tmp_path)] == [0, 2, 4, 6, 9, 12, 15]
    assert same_weights(weights(job.student), chosen.seen[4])
    checkpoint = load_file(tmp_path / "checkpoints" / "00000006-001" / "model.safetensors")
    assert all(torch.equal(checkpoint[name], value) for name, value in chosen.seen[1].items())


def whole_batches(epochs: Sequence[int], **kept: bool) -> list[Stage]:
    """Stages on the same 12 rows at the same temperature: with batches of 12, their steps differ in nothing."""
    ids = tuple(row.id for row in toy_rows(12))
    return [Stage(index, ids, number, 1.0, 0.7, **kept) for index, number in enumerate(epochs)]


def test_second_stage_when_it_keeps_optimizer_and_schedule_then_is_the_firsts_going_on(tmp_path):
    kept = {"restart_optimizer": False, "restart_lr": False}
    two = make_job(tmp_path / "two", stages=whole_batches([2, 3], **kept), global_batch_size=12)
    one = make_job(tmp_path / "one", stages=whole_batches([5]), global_batch_size=12)
    fresh = make_job(tmp_path / "fresh", stages=whole_batches([2, 3], restart_lr=False), global_batch_size=12)
    for job in (two, one, fresh):
        train(job)

    assert steps_of(two) == steps_of(one)
    assert same_weights(weights(two.student), weights(one.student))
    # The schedule alone, with fresh moments, makes other steps from the second one of the stage on.
    assert [step[2] for step in steps_of(fresh)] == [step[2] for step in steps_of(one)]
    assert not same_weights(weights(fresh.student), weights(one.student))


def steps_of(job: TrainingJob) -> list[tuple[float, float, float]]:
    return [(line["loss"], line["grad_norm"], line["lr"]) for line in train_lines(job.folder)]


def test_learning_rate_when_a_stage_starts_then_is_lr_again_and_falls_by_a_half_cosine(tmp_path):
    train(make_job(tmp_path, lr=4e-3, lr_end=4e-5))

    for stage, steps in enumerate(STEPS):
        rates = [line["lr"] for line in train_lines(tmp_path) if line["stage"] == stage]
        assert rates[0] == 4e-3
        falling = [4e-5 + (4e-3 - 4e-5) * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
        assert rates == pytest.approx(falling, rel=1e-12)


def test_temperature_and_ratio_when_a_stage_trains_then_are_that_stages(tmp_path):
    train(make_job(tmp_path))

    lines = train_lines(tmp_path)
    assert {(one["stage"], one["temperature"], one["kd_ratio"]) for one in lines} == {(0, 1.0, 0.7), (1, 2.0, 1.0)}
    for one in lines:
        kd = one["kd"] * one["temperature"] ** 2
        assert one["loss"] == pytest.approx((1 - one["kd_ratio"]) * one["ce"] + one["kd_ratio"] * kd, rel=1e-5)


# Step 0 belongs to no stage; stage 0 is best after its first epoch; in stage 1 both epochs tie on ROUGE-L, and the
# second has the lower cross entropy.
FIGURES = [(9.0, 1.0), (5.0, 3.0), (4.0, 1.0), (3.0, 3.0), (3.0, 2.0)]


@pytest.mark.parametrize(("keep_best", "handed_on", "kept"), [(True, 1, 4), (False, 2, 4)], ids=["best", "last"])
def test_stage_when_it_ends_then_hands_on_the_state_of_the_policy(tmp_path, keep_best, handed_on, kept):
    whole = make_job(tmp_path / "whole", keep_best=keep_best)
    chosen = ChosenFigures(whole, FIGURES)
    train(replace(whole, evaluate_dev=chosen))

    checkpoint = load_file(tmp_path / "whole" / "checkpoints" / "00000004-001" / "model.safetensors")
    assert all(torch.equal(checkpoint[name], value) for name, value in chosen.seen[handed_on].items())
    assert same_weights(weights(whole.student), chosen.seen[kept])
    assert not same_weights(chosen.seen[1], chosen.seen[2])
    # And stage 1 did start from it: from there, a run of that stage alone makes the same steps.
    alone = replace(make_job(tmp_path / "alone"), stages=whole.stages[1:], table=whole.table[1:])
    for name, parameter in alone.student.backbone.named_parameters():
        parameter.data.copy_(chosen.seen[handed_on][name])
    train(alone)
    stage_one = [line["loss"] for line in train_lines(tmp_path / "whole") if line["stage"] == 1]
    assert [line["loss"] for line in train_lines(tmp_path / "alone")] == stage_one


def test_last_stage_when_its_best_state_is_not_its_last_then_keeps_the_best(tmp_path):
    figures = [*FIGURES[:3], (3.0, 2.0), (3.0, 3.0)]

    chosen = train_with_figures(tmp_path, figures, keep_best=True)

    assert same_weights(weights(chosen.student), chosen.seen[3])


def test_best_state_when_two_are_equal_then_the_earlier_one_is_kept(tmp_path):
    chosen = train_with_figures(tmp_path, [(3.0, 2.0)] * 5, keep_best=True)

    assert same_weights(weights(chosen.student), chosen.seen[3])


def test_teacher_when_the_student_trains_then_stays_as_it_was(tmp_path):
    job = make_job(tmp_path, max_steps=2)
    teacher = job.student.teacher.headed
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    train(job)

    assert same_weights(dict(teacher.state_dict()), before)
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {name.split(".")[0] for name, _ in job.student.named_parameters()} == {"headed"}


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("drop_last", [False, True])
def test_consumed_rows_when_trained_then_are_the_samplers_and_those_of_the_stages_subsets(tmp_path, drop_last):
    job = make_job(tmp_path, rows=toy_rows(10), drop_last=drop_last)

    train(job)

    consumed = read_consumed(tmp_path)
    expected, step = [], 0
    for stage, row in zip(job.stages, job.table, strict=True):
        sampler = Sampler(stage, seed=7, global_batch_size=4, drop_last=drop_last)
        for stage_step in range(row["steps"]):
            step += 1
            for record_id in sampler.global_batch(stage_step):
                epoch = sampler.epoch(stage_step)
                expected.append({"stage": stage.index, "epoch": epoch, "step": step, "id": record_id})
    assert consumed == expected
    for row in consumed:
        assert row["id"] in job.stages[row["stage"]].record_ids
    assert max(row["step"] for row in consumed) == (6 if drop_last else 10)


def test_epoch_when_partial_batches_are_kept_then_sees_every_row_of_its_stage_once(tmp_path):
    job = make_job(tmp_path, rows=toy_rows(10))

    train(job)

    seen = Counter((row["stage"], row["epoch"], row["id"]) for row in read_consumed(tmp_path))
    assert set(seen.values()) == {1}
    assert len(seen) == 2 * 5 + 2 * 10


def test_batches_when_partial_ones_are_dropped_then_are_all_whole(tmp_path):
    train(make_job(tmp_path, rows=toy_rows(10), drop_last=True))

    sizes = [len(list(rows)) for _, rows in groupby(read_consumed(tmp_path), key=lambda row: row["step"])]
    assert sizes == [4] * 6


def test_max_steps_when_there_are_two_stages_then_stops_there_on_the_whole_schedule(tmp_path):
    train(make_job(tmp_path / "whole"))
    train(make_job(tmp_path / "cut", max_steps=6, evaluates=True))

    assert train_lines(tmp_path / "cut") == train_lines(tmp_path / "whole")[:6]
    assert max(row["step"] for row in read_consumed(tmp_path / "cut")) == 6
    assert [line["step"] for line in dev_lines(tmp_path / "cut")] == [0, 2, 4, 6]


@pytest.mark.parametrize("max_steps", [2, 7])
def test_max_steps_when_there_is_one_stage_then_is_the_number_of_steps_and_the_schedules_length(tmp_path, max_steps):
    stage = Stage(0, tuple(row.id for row in toy_rows(12)), 1, 1.0, 1.0)

    train(make_job(tmp_path, stages=[stage], max_steps=max_steps, lr_end=0.0))

    lines = train_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, max_steps + 1))
    assert [line["epoch"] for line in lines] == [step // 3 for step in range(max_steps)]
    assert lines[-1]["lr"] == pytest.approx(4e-3 * (1 + math.cos(math.pi * (max_steps - 1) / max_steps)) / 2, rel=1e-12)


def test_step_when_no_row_has_a_response_token_then_makes_no_loss_and_no_nan(tmp_path):
    empty = [TokenisedRow(f"r{i:02d}", [5, 6, 7], []) for i in range(4)]
    stage = Stage(0, tuple(row.id for row in empty), 2, 1.0, 0.5)
    job = make_job(tmp_path, rows=empty, stages=[stage])

    train(job)

    figures = [
        (line["loss"], line["ce"], line["kd"], line["grad_norm"], line["num_tokens"]) for line in train_lines(tmp_path)
    ]
    assert figures == [(0.0, 0.0, 0.0, 0.0, 0)] * 2
    assert all(value.isfinite().all() for value in weights(job.student).values())


def test_step_when_some_rows_have_no_response_token_then_is_that_of_the_others(tmp_path):
    rows = toy_rows(4)
    more = [*rows[:2], TokenisedRow("e", [5, 6, 7], []), *rows[2:]]

    train(make_job(tmp_path / "without", rows=rows, stages=[one_batch(rows)], global_batch_size=5))
    train(make_job(tmp_path / "with", rows=more, stages=[one_batch(more)], global_batch_size=5))

    (without,), (with_empty,) = train_lines(tmp_path / "without"), train_lines(tmp_path / "with")
    assert with_empty == pytest.approx(without, rel=1e-5)


def one_batch(rows: list[TokenisedRow] | tuple[TokenisedRow, ...]) -> Stage:
    return Stage(0, tuple(row.id for row in rows), 1, 1.0, 0.5)


# ── lines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_train_lines_when_logged_every_fifth_step_then_hold_the_first_and_every_stages_last_too(tmp_path):
    train(make_job(tmp_path, log_every=5))

    assert [line["step"] for line in train_lines(tmp_path)] == [1, 4, 5, 10]


def test_train_lines_when_read_then_have_the_promised_keys_and_count_response_tokens(tmp_path):
    job = make_job(tmp_path)

    train(job)

    lines = train_lines(tmp_path)
    assert set(lines[0]) == {
        *("step", "stage", "epoch", "loss", "ce", "kd", "grad_norm", "lr", "num_tokens"),
        *("temperature", "kd_ratio"),
    }
    for line in lines:
        before = [row["id"] for row in read_consumed(tmp_path) if row["step"] <= line["step"]]
        assert line["num_tokens"] == sum(len(job.rows.row(record_id).response_ids) for record_id in before)
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        *[(0, 0), (0, 0), (0, 1), (0, 1)],
        *[(1, 0)] * 3,
        *[(1, 1)] * 3,
    ]


@pytest.mark.parametrize(
    ("evaluate_every", "expected"),
    [
        (1, [(0, 0, 0), (2, 0, 1), (4, 0, 2), (7, 1, 1), (10, 1, 2)]),
        (2, [(0, 0, 0), (4, 0, 2), (10, 1, 2)]),
        (5, [(0, 0, 0), (4, 0, 2), (10, 1, 2)]),
    ],
)
def test_dev_lines_when_evaluated_every_so_many_epochs_then_come_before_training_and_at_stage_ends_too(
    tmp_path, evaluate_every, expected
):
    train(make_job(tmp_path, evaluates=True, evaluate_every=evaluate_every))

    lines = dev_lines(tmp_path)
    assert [(line["step"], line["stage"], line["epoch"]) for line in lines] == expected
    assert {name for line in lines for name in line} == {"step", "stage", "epoch", "dev_rouge_l", "dev_cross_entropy"}


def test_lines_when_tracked_then_are_those_of_the_file(tmp_path):
    tracked: list[Mapping[str, Any]] = []

    train(make_job(tmp_path, evaluates=True, track=lambda values, step: tracked.append(values)))

    assert tracked == read_lines(tmp_path)


def test_gradient_norm_when_it_is_clipped_then_is_logged_as_it_was(tmp_path):
    train(make_job(tmp_path / "loose", grad_clip=1e9, max_steps=3))
    train(make_job(tmp_path / "tight", grad_clip=1e-3, max_steps=3))

    loose, tight = train_lines(tmp_path / "loose"), train_lines(tmp_path / "tight")
    assert tight[0]["grad_norm"] == loose[0]["grad_norm"] > 1e-3
    assert tight[2]["loss"] != loose[2]["loss"]


def test_dropout_when_it_is_on_then_is_a_function_of_the_seed(tmp_path):
    losses = {}
    for name, dropout, seed in (("a", 0.3, 7), ("b", 0.3, 7), ("other seed", 0.3, 8), ("none", 0.0, 7)):
        torch.manual_seed(len(name))  # what the process has drawn before does not matter
        # One batch a step holds all rows, so that the seed's order of rows does not decide the loss.
        stage = one_batch(toy_rows(8))
        train(
            make_job(
                tmp_path / name, student=make_student(dropout=dropout), stages=[stage], global_batch_size=8, seed=seed
            )
        )
        losses[name] = train_lines(tmp_path / name)[0]["loss"]

    assert losses["a"] == losses["b"]
    assert abs(losses["a"] - losses["other seed"]) > 1e-4
    assert abs(losses["a"] - losses["none"]) > 1e-4


def test_dropout_when_weights_and_rows_are_those_of_the_step_before_then_differs_all_the_same(tmp_path):
    (row,) = toy_rows(1)
    student, stage = make_student(dropout=0.3), replace(one_batch([row]), epochs=2)
    train(make_job(tmp_path, student=student, rows=[row], stages=[stage], lr=0.0, lr_end=0.0, global_batch_size=1))

    first, second = train_lines(tmp_path)
    assert abs(first["loss"] - second["loss"]) > 1e-4


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────


def poison_loss(job: TrainingJob, row: TokenisedRow) -> None:
    """Makes the loss of every batch with `row`, which alone is so long, not a number."""
    job.student.backbone.transformer.wpe.weight.data[row.num_tokens - 2] = math.nan


def poison_gradient(job: TrainingJob, row: TokenisedRow) -> None:
    longest = row.num_tokens
    position_weight = job.student.backbone.transformer.wpe.weight
    position_weight.register_hook(lambda grad: grad * math.inf if grad[longest - 2].any() else grad)


@pytest.mark.parametrize(("poison", "what"), [(poison_loss, "loss"), (poison_gradient, "gradient norm")])
def test_step_when_its_loss_or_gradient_is_not_finite_then_is_not_made_and_says_where(tmp_path, poison, what):
    long = TokenisedRow("long", [5] * 50, [6] * 5)
    rows = [*toy_rows(11), long]
    clean = make_job(tmp_path / "clean", rows=rows)
    train(clean)
    bad = next(row["step"] for row in read_consumed(tmp_path / "clean") if row["id"] == "long")
    batch = [row["id"] for row in read_consumed(tmp_path / "clean") if row["step"] == bad]
    assert bad > STEPS[0] + 1, "the long row is first seen inside stage 1"
    before = make_job(tmp_path / "before", rows=rows, max_steps=bad - 1)
    job = make_job(tmp_path / "bad", rows=rows, checkpoint_every=2)
    for one in (before, job):
        poison(one, long)
    train(before)

    with pytest.raises(NonFiniteError) as caught:
        train(job)

    assert caught.value.exit_code == 7
    assert str(caught.value).startswith(f"the {what} is ")
    assert f"in stage 1, step {bad} — the records of the batch are {', '.join(batch)};" in str(caught.value)
    now = weights(job.student)
    for name, value in weights(before.student).items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True)
    assert max(line["step"] for line in train_lines(tmp_path / "bad")) < bad
    again = replace(job, student=make_student())
    poison(again, long)
    with pytest.raises(NonFiniteError):  # the checkpoint before it leads to the same place
        train(again)


# ── signals ───────────────────────────────────────────────────────────────────────────────────────────────────────


def kill_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def newest_checkpoint(folder: Path) -> str:
    return max((path.name for path in folder.glob("checkpoints/[0-9]*-*")), default="none")


def finish_and_compare(folder: Path, whole: Path) -> None:
    """Runs both to their ends and compares what they leave."""
    for one in (folder, whole):
        state = train(make_job(one, evaluates=True, keep_best=True))
        assert (state.step, state.dev_due) == (10, False)
    for name in ("metrics.jsonl", "consumed.parquet", "checkpoints/00000010-002/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 2, 4, 5, 10])
def test_signal_when_it_comes_at_the_end_of_a_step_then_a_checkpoint_of_that_step_is_written(
    tmp_path, number, exit_code, step
):
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    folder = tmp_path / "killed"
    job = make_job(folder, evaluates=True, keep_best=True)

    with pytest.raises(Interrupted) as caught:
        train(replace(job, show=after_step(step, kill_self(number))))

    assert caught.value.exit_code == exit_code
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert newest_checkpoint(folder).startswith(f"{step:08d}-")
    finish_and_compare(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    ("step", "newest"), [(1, "none"), (3, "00000002-000"), (5, "00000004-001"), (9, "00000008-001")]
)
def test_signal_when_it_comes_inside_a_step_then_that_step_is_given_up_at_once(tmp_path, step, newest):
    folder = tmp_path / "killed"
    job = make_job(folder, evaluates=True, keep_best=True)
    reached: list[str] = []

    def kill_in_step(*_: object) -> None:
        if len(reached) == 2 * step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    job.student.register_forward_pre_hook(lambda *_: reached.append("in"))
    job.student.headed.head.projection.register_forward_pre_hook(kill_in_step)
    job.student.register_forward_hook(lambda *_: reached.append("out"))

    with pytest.raises(Interrupted):
        train(job)

    assert reached == ["in", "out"] * (step - 1) + ["in"]
    assert newest_checkpoint(folder) == newest
    finish_and_compare(folder, tmp_path / "whole")


@pytest.mark.parametrize(("evaluation", "newest"), [(1, "00000002-000"), (2, "00000004-000"), (4, "00000010-001")])
def test_signal_when_it_comes_inside_a_dev_evaluation_then_it_is_given_up_at_once_and_comes_first_in_the_rerun(
    tmp_path, evaluation, newest
):
    folder = tmp_path / "killed"
    job = make_job(folder, evaluates=True, keep_best=True)
    begun, ended = [], []

    def evaluate(stage: int) -> dict[str, float]:
        if len(begun) == evaluation:
            begun.append(1)
            kill_self(signal.SIGTERM)()
        begun.append(1)
        figures = job.evaluate_dev(stage)
        ended.append(1)
        return figures

    with pytest.raises(Interrupted):
        train(replace(job, evaluate_dev=evaluate))

    assert len(ended) == evaluation
    assert newest_checkpoint(folder) == newest
    finish_and_compare(folder, tmp_path / "whole")


def test_signal_when_it_comes_again_while_the_checkpoint_is_written_then_the_checkpoint_is_whole(tmp_path, monkeypatch):
    def kill_in_save(event: str, what: str) -> None:
        if what.endswith("optimizer.safetensors"):
            kill_self(signal.SIGTERM)()

    job = make_job(tmp_path / "killed", evaluates=True, keep_best=True)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(faults, "hook", kill_in_save)
        train(replace(job, show=after_step(3, kill_self(signal.SIGTERM))))

    assert newest_checkpoint(tmp_path / "killed") == "00000003-000"
    finish_and_compare(tmp_path / "killed", tmp_path / "whole")


def test_sigint_when_it_comes_twice_then_the_run_ends_at_once(tmp_path):
    job = make_job(tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(replace(job, show=after_step(2, twice)))

    assert newest_checkpoint(tmp_path) == "none"


# ── a method that changes ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Counting:
    """Forward KL that counts its steps in its state, and remembers what the loop told it."""

    told: list[tuple[float, float]] = field(default_factory=list)
    needs_teacher, t_squared = True, True

    def __call__(self, student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the loop must ask for the method of the step")

    def for_step(self, progress: float, state: MethodState) -> KDMethod:
        self.told.append((progress, float(state.get("steps", torch.zeros(())))))
        forward_kl: KDMethod = kd_methods.build({"name": "fkl", "t_squared": True})
        return forward_kl

    def after_step(self, progress: float, state: MethodState, kd: torch.Tensor) -> MethodState:
        self.told.append((progress, float(kd)))
        return {"steps": state.get("steps", torch.zeros_like(kd)) + 1}


def test_method_that_evolves_when_trained_then_is_told_progress_state_and_divergence_of_every_step(tmp_path):
    job = make_job(tmp_path)
    job.student.method = method = Counting()

    train(job)

    assert method.told[::2] == [(step / 10, step) for step in range(10)]
    assert method.told[1::2] == [((line["step"]) / 10, line["kd"]) for line in train_lines(tmp_path)]
    assert len(method.told) == 20


# ── waiting for the device ────────────────────────────────────────────────────────────────────────────────────────


class Waits(TorchDispatchMode):
    """Counts what would hold up the host where the tensors are on a GPU: reading a value, and copies to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("method", ["fkl", "jsd", "sft", "taid", "ranking", "gkd"])
def test_step_between_two_lines_reads_no_value_from_the_device(tmp_path, monkeypatch, method, packs):
    waits, seen = Waits(), []
    student = make_student(method)
    if method == "gkd":  # in a step on the rows; to answer prompts is to wait
        student.method = replace(student.method, student_share=1e-9)
    job = make_job(tmp_path, student=student, log_every=4, max_steps=3, track=lambda *_: waits.names.clear())

    if not packs:
        monkeypatch.setattr(HeadedModel, "packs", False)
    assert job.student.packs is packs

    def after_step(n: int, note: str = "") -> None:
        seen.append(list(waits.names))
        waits.names.clear()

    with waits:
        train(replace(job, show=after_step))

    assert [line["step"] for line in train_lines(tmp_path)] == [1, 3]
    assert seen[1] == []


@pytest.mark.parametrize("step", [2, 3])
def test_step_that_is_not_finite_between_two_lines_is_named_at_the_next_and_nothing_changes_after_it(tmp_path, step):
    job = make_job(tmp_path / "bad", log_every=4, evaluate_every=0)
    before = make_job(tmp_path / "good", max_steps=step - 1)
    train(before)
    steps = iter(range(1, 11))
    method = job.student.method

    class Poisoned:
        needs_teacher, t_squared = True, True

        def __call__(self, student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor) -> torch.Tensor:
            value = method(student_logprobs_NV, teacher_logprobs_NV)
            return value * float("nan") if next(steps) == step else value

    job.student.method = Poisoned()

    with pytest.raises(NonFiniteError, match=f"stage 0, step {step} "):
        train(job)

    assert same_weights(weights(job.student), weights(before.student))
