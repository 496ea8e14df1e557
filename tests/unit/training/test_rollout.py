"""Steps on rows that the student writes: what the answers are, what the loss is made of, and who agrees on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_cli.errors import NonFiniteError
from pocl_cli.losses.evolving import MethodState
from pocl_cli.losses.on_policy import OnPolicy, Part, StudentAnswers
from pocl_cli.models.generate import Mixture, generate
from pocl_cli.models.sampling import row_seed
from pocl_cli.models.teacher import OnlineTeacher
from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.objective import collate
from pocl_cli.training.parallel import ALONE
from pocl_cli.training.replica import Replica
from pocl_cli.training.rollout import Rollout
from pocl_cli.training.student import StudentWithObjective

from ...support.aborts import Aborted, abort_after
from ...support.processes import in_processes
from ...support.splits import assert_any_split_is_the_same
from ...support.training import (
    dev_lines,
    make_job,
    make_rollout,
    make_student,
    read_consumed,
    same_weights,
    toy_rows,
    train_lines,
    two_stages,
    weights,
)

# About every tenth token of the random student's answers.
ENDS = frozenset(range(0, 60, 7))


def gkd_student(student_share: float = 1.0, *, dropout: float = 0.0, **changes: Any) -> StudentWithObjective:
    student = make_student("gkd", dtype=torch.float64, dropout=dropout)
    student.method = replace(student.method, student_share=student_share, **changes)  # type: ignore[type-var]
    return student


def gkd_job(folder: Path, student_share: float = 1.0, **changes: Any) -> TrainingJob:
    job = make_job(folder, student=gkd_student(student_share), global_batch_size=3, **changes)
    return replace(job, rollout=replace(job.rollout, eos_token_ids=ENDS) if job.rollout is not None else None)


def answers(rows: list[TokenisedRow] | tuple[TokenisedRow, ...], step: int = 5, **changes: Any) -> list[TokenisedRow]:
    student = gkd_student()
    rollout = replace(make_rollout(student, 7), eos_token_ids=ENDS, **changes)
    return rollout.rows(rows, step, Replica(student, ALONE))


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_when_written_then_end_with_the_token_that_ended_them_and_keep_to_both_limits() -> None:
    gold = toy_rows(12)
    decoding = make_rollout(gkd_student(), 7).decoding.model_copy(update={"max_new_tokens": 9})

    max_tokens = max(len(row.prompt_ids) for row in gold) + 4
    written = answers(gold, decoding=decoding, max_tokens=max_tokens)

    assert [(row.id, row.prompt_ids) for row in written] == [(row.id, row.prompt_ids) for row in gold]
    assert {row.response_cut for row in written} == {False, True}
    rooms = [min(9, max_tokens - len(row.prompt_ids)) for row in gold]
    assert {min(rooms), max(rooms)} == {4, 9}
    for row, room in zip(written, rooms, strict=True):
        *before, last = row.response_ids
        assert ENDS.isdisjoint(before)
        assert (last in ENDS) is not row.response_cut
        assert len(row.response_ids) <= room
        assert not row.response_cut or len(row.response_ids) == room


def test_answers_when_compared_with_the_decoder_then_are_draws_of_seed_id_and_step() -> None:
    gold, student = toy_rows(3), gkd_student()

    written = answers(gold)

    streams = [[row_seed(7, row.id, "training 5 0")] for row in gold]
    drawn = generate(
        student.headed,
        [row.prompt_ids for row in gold],
        seeds=streams,
        decoding=make_rollout(student, 7).decoding,
        eos_token_ids=ENDS,
        pad_token_id=0,
        max_tokens_per_batch=4096,
        context_length=64,
        vocabulary_size=student.num_real_tokens,
    )
    assert [list(row.response_ids)[: len(one.token_ids)] for row, (one,) in zip(written, drawn, strict=True)] == [
        list(one.token_ids) for (one,) in drawn
    ]


def test_answers_when_asked_for_alone_or_together_then_are_the_same_and_others_in_another_step() -> None:
    gold = toy_rows(6)

    together = answers(gold)

    assert together == [answers([row])[0] for row in gold]
    assert together != answers(gold, step=6)
    assert together != answers(gold, seed=8)


def test_answers_when_a_batch_holds_a_row_twice_then_differ() -> None:
    row = toy_rows(1)[0]

    first, second = answers([row, row])

    assert first == answers([row])[0]
    assert second.response_ids != first.response_ids


def test_answers_when_written_then_leave_random_state_and_mode_as_they_were() -> None:
    student = gkd_student(dropout=0.1).train()
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)

    written = make_rollout(student, 7).rows(toy_rows(4), 0, Replica(student, ALONE))

    assert torch.equal(torch.rand(5), expected)
    assert all(module.training for module in student.headed.modules())
    # Without dropout: the answers are those of the student in evaluation mode.
    assert written == make_rollout(student, 7).rows(toy_rows(4), 0, Replica(gkd_student().eval(), ALONE))


def test_answers_when_the_teacher_takes_part_then_are_draws_from_both() -> None:
    student, gold = gkd_student(), toy_rows(6)
    assert isinstance(student.teacher, OnlineTeacher)

    written = answers(gold, teacher_mix=0.4)

    assert written != answers(gold)
    assert written == [answers([row], teacher_mix=0.4)[0] for row in gold]
    drawn = generate(
        student.headed,
        [row.prompt_ids for row in gold],
        seeds=[[row_seed(7, row.id, "training 5 0")] for row in gold],
        decoding=make_rollout(student, 7).decoding,
        eos_token_ids=ENDS,
        pad_token_id=0,
        max_tokens_per_batch=4096,
        context_length=64,
        vocabulary_size=student.num_real_tokens,
        mixture=Mixture(student.teacher.headed, 0.4),
    )
    assert [tuple(row.response_ids)[: len(one.token_ids)] for row, (one,) in zip(written, drawn, strict=True)] == [
        one.token_ids for (one,) in drawn
    ]


def test_answers_when_the_student_gives_nan_then_name_records() -> None:
    student = gkd_student()
    with torch.no_grad():
        next(student.headed.model.parameters()).fill_(torch.nan)

    with pytest.raises(NonFiniteError, match="r00, r01"):
        make_rollout(student, 7).rows(toy_rows(2), 0, Replica(student, ALONE))


# ── the step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gkd_with_share_zero_when_trained_then_is_its_divergence_to_the_bit(tmp_path: Path) -> None:
    plain, mixed = make_student("jsd", dropout=0.1), make_student("gkd", dropout=0.1)
    mixed.method = replace(mixed.method, student_share=0.0)  # type: ignore[type-var]
    assert mixed.method.base == plain.method  # type: ignore[attr-defined]

    train(make_job(tmp_path / "jsd", student=plain))
    train(make_job(tmp_path / "gkd", student=mixed))

    assert (tmp_path / "gkd" / "metrics.jsonl").read_bytes() == (tmp_path / "jsd" / "metrics.jsonl").read_bytes()
    assert same_weights(weights(mixed), weights(plain))


def test_step_on_generated_rows_when_made_then_is_the_mean_divergence_of_their_tokens(tmp_path: Path) -> None:
    job, student = gkd_job(tmp_path, max_steps=1), gkd_student()
    train(job)
    (line,) = train_lines(tmp_path)

    gold = [job.rows.row(row["id"]) for row in read_consumed(tmp_path)]
    written = job.rollout.rows(gold, 0, Replica(student, ALONE))  # type: ignore[union-attr]
    num_tokens = sum(len(row.response_ids) for row in written)
    student.train()
    output = student(collate(written), temperature=1.0, kd_ratio=1.0, normaliser=num_tokens, method=student.method.base)
    output.loss.backward()
    loss = output.loss.item()
    norm = torch.nn.utils.get_total_norm([one.grad for one in student.parameters() if one.grad is not None])

    assert line["kd_ratio"] == 0.7
    assert (line["loss"], line["kd"]) == pytest.approx((loss, float(output.kd_sum) / num_tokens))
    assert line["ce"] == pytest.approx(float(output.ce_sum) / num_tokens)
    assert line["grad_norm"] == pytest.approx(float(norm))
    assert line["num_tokens"] == num_tokens
    assert (line["generated_rows"], line["generated_tokens"]) == (3, num_tokens / 3)
    assert line["generated_ended_with_eos"] == pytest.approx(100 * sum(not row.response_cut for row in written) / 3)


def test_steps_when_half_are_on_generated_rows_then_the_coin_of_seed_and_step_says_which(tmp_path: Path) -> None:
    train(gkd_job(tmp_path / "half", 0.5))
    train(gkd_job(tmp_path / "again", 0.5, seed=8))

    coins = [line["generated_rows"] for line in train_lines(tmp_path / "half")]
    asked = [
        gkd_student(0.5).method.rows_for_step(7, step, 0.0, {}, 0.7)  # type: ignore[operator]
        for step in range(len(coins))
    ]
    assert asked == [(Part("generated", 1.0),) if coin else (Part("gold", 0.7),) for coin in coins]
    assert set(coins) == {0, 3}
    assert coins != [line["generated_rows"] for line in train_lines(tmp_path / "again")]
    # The gold steps have their cross entropy in the loss.
    for line, coin in zip(train_lines(tmp_path / "half"), coins, strict=True):
        ratio = 1.0 if coin else line["kd_ratio"]
        kd = line["kd"] * line["temperature"] ** 2
        assert line["loss"] == pytest.approx((1 - ratio) * line["ce"] + ratio * kd)


def test_coin_when_tossed_often_then_falls_in_the_share_of_the_steps() -> None:
    method = gkd_student(0.3).method
    assert isinstance(method, OnPolicy)

    heads = [method.rows_for_step(1, step, 0.0, {}, 1.0)[0].rows == "generated" for step in range(4000)]

    assert sum(heads) / len(heads) == pytest.approx(0.3, abs=0.03)
    assert all(gkd_student(1.0).method.rows_for_step(1, s, 0.0, {}, 1.0)[0].rows == "generated" for s in range(99))  # type: ignore[operator]


def test_gkd_of_a_method_that_changes_when_asked_then_changes_with_it() -> None:
    values = {"schedule": "linear", "t_start": 0.2, "t_end": 1.0, "rate": 0.1, "momentum": 0.5, "t_squared": True}
    base = kd_methods.build({"name": "taid", **values})
    method: Any = replace(gkd_student().method, base=base)  # type: ignore[type-var]

    assert method.for_step(0.5, {}) == base.for_step(0.5, {})
    adaptive = replace(base, schedule="adaptive")
    state = replace(method, base=adaptive).after_step(0.1, {}, torch.tensor(2.0))
    assert state.keys() == adaptive.after_step(0.1, {}, torch.tensor(2.0)).keys() == {"t", "average_fall", "loss"}


@dataclass(frozen=True, kw_only=True)
class BothParts(StudentAnswers):
    """Forward KL on generated rows and cross entropy on gold ones, both in every step."""

    needs_teacher, t_squared, generates = True, True, True
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 12
    told: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, student_logprobs_NV: torch.Tensor, teacher_logprobs_NV: torch.Tensor) -> torch.Tensor:
        divergence: torch.Tensor = kd_methods.build({"name": "fkl", "t_squared": True})(
            student_logprobs_NV, teacher_logprobs_NV
        )
        return divergence

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        return Part("generated", 1.0, kd_ratio), Part("gold", 0.0, 1 - kd_ratio)

    def after_dev(self, figures: Mapping[str, float], state: MethodState) -> MethodState:
        self.told.append(dict(figures))
        return {"evaluations": state.get("evaluations", torch.zeros(())) + 1}


def both_job(folder: Path, **changes: Any) -> TrainingJob:
    student = make_student(dtype=torch.float64)
    student.method = BothParts()
    job = make_job(folder, student=student, global_batch_size=5, **changes)
    return replace(job, rollout=replace(make_rollout(student, 7), eos_token_ids=ENDS))


def test_step_of_two_parts_when_made_then_each_has_its_own_tokens_and_weight(tmp_path: Path) -> None:
    train(both_job(tmp_path))

    first, *_, last = train_lines(tmp_path)
    for line in (first, last):
        kd = line["kd"] * line["temperature"] ** 2
        assert line["loss"] == pytest.approx((1 - line["kd_ratio"]) * line["ce"] + line["kd_ratio"] * kd)
    assert first["ce"] > 0
    assert (first["kd_ratio"], last["kd_ratio"]) == (0.7, 1.0)  # with a weight of 0, there is no gold part
    consumed = {row["id"] for row in read_consumed(tmp_path) if row["step"] == 1}
    gold = sum(len(row.response_ids) for row in toy_rows(12) if row.id in consumed)
    assert first["num_tokens"] == pytest.approx(gold + first["generated_rows"] * first["generated_tokens"])


def test_method_that_heeds_dev_evaluations_when_trained_then_is_told_each_and_its_state_is_kept(tmp_path: Path) -> None:
    job = both_job(tmp_path, evaluates=True, keep_best=True)
    train(job)

    method = job.student.method
    assert isinstance(method, BothParts)
    figures = [{k: v for k, v in line.items() if k.startswith("dev_")} for line in dev_lines(tmp_path)]
    assert method.told == figures
    assert len(figures) > 4


def minillm_job(folder: Path, teacher_mix: float = 0.0, **changes: Any) -> TrainingJob:
    student = make_student("minillm", dtype=torch.float64)
    student.method = replace(student.method, teacher_mix=teacher_mix)  # type: ignore[type-var]
    job = make_job(folder, student=student, global_batch_size=5, **changes)
    return replace(job, rollout=replace(make_rollout(student, 7), eos_token_ids=ENDS))


# ── several processes ─────────────────────────────────────────────────────────────────────────────────────────────────


GKD, MIXED = partial(gkd_job, student_share=0.5), partial(minillm_job, teacher_mix=0.2)


@pytest.mark.parametrize(
    ("job", "size", "parallel", "micro_batch"),
    [
        *[(job, *split) for job in (GKD, MIXED) for split in ((2, "ddp", 4096), (3, "ddp", 60))],
        *[(job, *split) for job in (GKD, minillm_job) for split in ((2, "fsdp", 1), (3, "fsdp", 60))],
    ],
)
def test_losses_and_gradient_norms_when_split_in_any_way_then_are_those_of_one_process(
    tmp_path: Path, job: Any, size: int, parallel: str, micro_batch: int
) -> None:
    rows = toy_rows(12)
    # A small rate: rounding must not choose other tokens.
    changes = {"stages": two_stages(rows), "lr": 1e-4}
    alone = assert_any_split_is_the_same(
        job, tmp_path, size=size, parallel=parallel, micro_batch=micro_batch, **changes
    )
    assert any(line["generated_rows"] for line in alone)


def test_answers_when_there_are_more_processes_than_rows_then_all_have_them(tmp_path: Path) -> None:
    expected = answers(toy_rows(2))

    def act(processes: Any) -> None:
        student = gkd_student()
        rollout = replace(make_rollout(student, 7), eos_token_ids=ENDS)
        assert rollout.rows(toy_rows(2), 5, processes.replica(student)) == expected

    in_processes(3, tmp_path, act)


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_run_on_generated_rows_when_interrupted_after_any_step_then_ends_in_the_same_bytes(
    tmp_path: Path, method: str
) -> None:
    def job(name: str) -> TrainingJob:
        student = make_student(method, dropout=0.1)
        made = make_job(tmp_path / name, student=student, checkpoint_every=2, evaluates=True, keep_best=True)
        assert isinstance(made.rollout, Rollout)
        return replace(made, rollout=replace(made.rollout, eos_token_ids=ENDS))

    def result(name: str) -> list[bytes]:
        run = job(name)
        train(run)
        newest = max(path for path in (run.folder / "checkpoints").iterdir() if path.name[0].isdigit())
        files = [newest / "model.safetensors", run.folder / "metrics.jsonl", run.folder / "consumed.parquet"]
        return [path.read_bytes() for path in files]

    undisturbed = result("undisturbed")
    generated = {line["generated_rows"] for line in train_lines(tmp_path / "undisturbed")}
    assert generated == ({0, 2, 4} if method == "gkd" else {2, 4})

    for step in range(1, 10):
        with pytest.raises(Aborted):
            train(replace(job(f"cut-{step}"), show=abort_after(step)))
        torch.manual_seed(step)  # what a new process draws before does not matter
        assert result(f"cut-{step}") == undisturbed, f"aborted after step {step}"


def test_stage_without_response_tokens_when_answered_then_makes_a_step(tmp_path: Path) -> None:
    empty = [replace(row, response_ids=[]) for row in toy_rows(4)]
    stage = Stage(0, tuple(row.id for row in empty), 1, 1.0, 1.0)
    train(gkd_job(tmp_path, rows=empty, stages=[stage]))

    assert all(line["generated_tokens"] >= 1 for line in train_lines(tmp_path))
