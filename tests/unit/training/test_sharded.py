"""A student in parts: trained as one process would have trained it, and whole whenever anyone looks at it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ArtifactError, Interrupted, NonFiniteError, WorkerError
from pocl_cli.models.attention import recompute_layers
from pocl_cli.models.generate import generate
from pocl_cli.models.head import split_model
from pocl_cli.models.prune import decoder_layers
from pocl_cli.records import Stage
from pocl_cli.schema import DecodingConfig
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.objective import collate
from pocl_cli.training.parallel import Processes
from pocl_cli.training.sharded import ShardedReplica
from pocl_cli.training.student import StudentWithObjective

from ...support.processes import in_processes
from ...support.training import (
    STUDENT,
    TEACHER,
    make_job,
    make_model,
    make_student,
    read_consumed,
    read_lines,
    same_weights,
    toy_rows,
    train_lines,
    weights,
)

TIED = {**STUDENT, "n_layer": 2}
# Sizes of which two and three processes have unequal parts; keys and values have 4 rows, of which the third has none.
UNTIED = {**TEACHER, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 7}


def make_deeper_student(
    architecture: Mapping[str, Any] = TIED, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, **changes: Any
) -> StudentWithObjective:
    """A student of several layers with a teacher of several layers."""
    student = make_student("jsd", dtype=dtype, memory_mb=0.11)
    padded = student.headed.num_logits
    teacher = make_model({**TEACHER, "num_hidden_layers": 2, "vocab_size": padded + 4}, 2, dtype=dtype, dropout=None)
    student.teacher = type(student.teacher)(split_model(teacher))
    student.headed = split_model(make_model({**architecture, "vocab_size": padded}, 1, dtype=dtype, dropout=dropout))
    student.hardware = replace(student.hardware, **changes)
    return student


def together(size: int, folder: Path, job: Callable[[], TrainingJob], parallel: str = "fsdp") -> None:
    in_processes(size, folder, lambda processes: train(replace(job(), processes=processes)), parallel=parallel)


def newest(folder: Path) -> Path:
    return max(path for path in (folder / "checkpoints").iterdir() if path.name[0].isdigit())


def results(folder: Path) -> dict[str, str]:
    files = [newest(folder) / "model.safetensors", folder / "metrics.jsonl", folder / "consumed.parquet"]
    return {path.name: sha256_file(path) for path in files}


# ── the same numbers ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("architecture", "splits"),
    # Processes, and tokens of a micro-batch: of five rows by themselves, one process has more than the other.
    [(TIED, [(1, 60), (2, 1)]), (UNTIED, [(2, 4096), (3, 1)])],
    ids=["tied", "untied"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_losses_and_gradient_norms_when_split_in_any_way_then_are_those_of_one_process(
    tmp_path: Path,
    architecture: Mapping[str, Any],
    splits: list[tuple[int, int]],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    rows = toy_rows(12)
    stages = [Stage(0, tuple(row.id for row in rows), 7, 2.0, 0.7)]  # 21 steps

    def job(name: str, **changes: Any) -> TrainingJob:
        student = make_deeper_student(architecture, dtype=dtype)
        # A small rate: rounding grows with the steps that are made, and is not what is compared.
        return make_job(tmp_path / name, student=student, stages=stages, lr=1e-4, global_batch_size=5, **changes)

    train(job("alone"))
    alone = train_lines(tmp_path / "alone")
    assert len(alone) == 21
    for size, micro_batch in splits:
        name = f"{size}-{micro_batch}"
        together(size, tmp_path, partial(job, name, max_tokens_per_micro_batch=micro_batch))
        for one, other in zip(train_lines(tmp_path / name), alone, strict=True):
            assert one == pytest.approx(other, rel=tolerance), name
        assert read_consumed(tmp_path / name) == read_consumed(tmp_path / "alone")


def test_losses_and_gradient_norms_when_processes_have_no_row_then_are_those_of_one(tmp_path: Path) -> None:
    def job(name: str) -> TrainingJob:
        student = make_deeper_student(dtype=torch.float64)
        return make_job(tmp_path / name, student=student, rows=toy_rows(6), global_batch_size=2)

    train(job("alone"))
    together(3, tmp_path, lambda: job("three"))

    alone, three = train_lines(tmp_path / "alone"), train_lines(tmp_path / "three")
    assert len(alone) == len(three) > 5
    for one, other in zip(three, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-10)


def test_bytes_when_the_same_processes_train_again_then_are_the_same(tmp_path: Path) -> None:
    for name in ("one", "other"):
        together(2, tmp_path, lambda: make_job(tmp_path / name, student=make_deeper_student(dropout=0.1)))  # noqa: B023

    assert results(tmp_path / "one") == results(tmp_path / "other")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_when_run_again_in_the_backward_pass_then_give_the_same_numbers(tmp_path: Path, precision: str) -> None:
    def job(name: str, recomputes: bool = False) -> TrainingJob:
        student = make_deeper_student(precision=precision)
        if recomputes:
            recompute_layers(student.backbone)
        return make_job(tmp_path / name, student=student, max_steps=3)

    together(2, tmp_path, lambda: job("ddp"), "ddp")
    together(2, tmp_path, lambda: job("kept"))
    together(2, tmp_path, lambda: job("recomputed", recomputes=True))

    ddp, kept = train_lines(tmp_path / "ddp"), train_lines(tmp_path / "kept")
    assert kept == train_lines(tmp_path / "recomputed")
    assert kept[0] == pytest.approx(ddp[0], rel=1e-6)


def test_parameter_when_no_process_has_a_gradient_for_it_then_stays_as_it_was(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        job = make_job(tmp_path / "run", student=make_deeper_student(), max_steps=2, weight_decay=0.5)
        unused = nn.Parameter(torch.ones(3, 2))
        job.student.backbone.register_parameter("unused", unused)
        train(replace(job, processes=processes))
        assert torch.equal(unused, torch.ones(3, 2))

    in_processes(2, tmp_path, act, parallel="fsdp")


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_processes_when_each_has_its_part_then_have_the_student_once_in_all(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        student = make_deeper_student(UNTIED)
        num_weights, before = sum(one.numel() for one in student.parameters()), weights(student)
        replica = processes.replica(student)

        parts = sum(one.numel() for one in student.parameters())
        assert int(processes.sum(torch.tensor(parts))) == num_weights
        assert parts < num_weights / 2
        with replica.whole():
            assert same_weights(weights(student), before)
        assert sum(one.numel() for one in student.parameters()) == parts
        replica.make_whole()
        assert same_weights(weights(student), before)

    in_processes(3, tmp_path, act, parallel="fsdp")


def test_changes_when_the_student_is_whole_then_stay_where_they_are_meant_to(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        student = make_deeper_student(UNTIED)
        replica = processes.replica(student)
        for changes, expected in ((False, 0), (True, 1)):
            with replica.whole(changes=changes), torch.no_grad():
                before = weights(student)
                for parameter in student.parameters():
                    parameter.add_(1)
            with replica.whole():
                assert same_weights(weights(student), {name: value + expected for name, value in before.items()})

    in_processes(3, tmp_path, act, parallel="fsdp")


def test_teacher_when_in_parts_then_has_the_same_hidden_states_to_the_bit(tmp_path: Path) -> None:
    batch = collate(toy_rows(3))
    expected = make_deeper_student().teacher.hidden_states(batch)  # type: ignore[union-attr]

    def act(processes: Processes) -> None:
        student = make_deeper_student()
        replica = processes.replica(student)
        assert student.teacher is not None
        assert student.teacher.backbone is not None

        for _ in range(2):
            assert torch.equal(student.teacher.hidden_states(batch), expected)
            layers = decoder_layers(student.teacher.backbone)
            assert {one.numel() for layer in layers for one in layer.parameters()} == {0}
        assert isinstance(replica, ShardedReplica)

    in_processes(3, tmp_path, act, parallel="fsdp")


def test_processes_when_they_decode_for_different_lengths_then_do_not_wait_for_each_other(tmp_path: Path) -> None:
    def answer(student: StudentWithObjective, rank: int) -> object:
        return generate(
            student.headed.eval(),
            [row.prompt_ids for row in toy_rows(3)[: rank + 1]],
            seeds=[[1]] * (rank + 1),
            decoding=DecodingConfig(
                sampling_temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=0, max_new_tokens=3 + 5 * rank
            ),
            eos_token_ids=[],
            pad_token_id=0,
            max_tokens_per_batch=4096,
            context_length=64,
            vocabulary_size=student.num_real_tokens,
        )

    def act(processes: Processes) -> None:
        student = make_deeper_student()
        expected = answer(make_deeper_student(), processes.rank)
        replica = processes.replica(student)
        with replica.whole(), torch.no_grad():
            assert answer(student, processes.rank) == expected

    in_processes(2, tmp_path, act, parallel="fsdp")


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_checkpoint_when_written_from_parts_then_has_the_form_of_one_process(tmp_path: Path) -> None:
    def job(name: str) -> TrainingJob:
        student = make_deeper_student(UNTIED, dtype=torch.float64)
        return make_job(tmp_path / name, student=student, max_steps=7, checkpoint_every=3)

    train(job("alone"))
    together(3, tmp_path, lambda: job("parts"))

    compared = 0
    for alone in (tmp_path / "alone" / "checkpoints").rglob("*.safetensors"):
        parts = tmp_path / "parts" / alone.relative_to(tmp_path / "alone")
        expected, found = load_file(alone), load_file(parts)
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12, msg=name)
        compared += 1
    assert compared == 3  # of two checkpoints, one inside a stage


def test_run_in_parts_when_killed_then_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def job(name: str, kills: bool = False) -> TrainingJob:
        def track(values: Any, step: int) -> None:
            if kills and step == 7:
                os._exit(0)  # the others find out by themselves

        student = make_deeper_student(UNTIED, dropout=0.1)
        return make_job(
            tmp_path / name, student=student, evaluates=True, keep_best=True, checkpoint_every=2, track=track
        )

    together(3, tmp_path, lambda: job("undisturbed"))
    with pytest.raises(AssertionError):
        together(3, tmp_path, lambda: job("killed", kills=True))
    assert newest(tmp_path / "killed").name == "00000006-001"
    together(3, tmp_path, lambda: job("killed"))

    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")


def test_run_in_parts_when_interrupted_then_all_stop_after_the_same_step_and_go_on_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    def job(name: str) -> TrainingJob:
        return make_job(tmp_path / name, student=make_deeper_student(dropout=0.1), evaluates=True, keep_best=True)

    def act(processes: Processes) -> None:
        def track(values: Any, step: int) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted) as caught:
            train(replace(job("interrupted"), processes=processes, track=track))
        assert caught.value.exit_code == 143

    together(2, tmp_path, lambda: job("undisturbed"))
    in_processes(2, tmp_path, act, parallel="fsdp")
    assert newest(tmp_path / "interrupted").name == "00000003-000"
    together(2, tmp_path, lambda: job("interrupted"))

    assert results(tmp_path / "interrupted") == results(tmp_path / "undisturbed")


def test_run_when_begun_in_another_way_then_is_refused(tmp_path: Path) -> None:
    together(2, tmp_path, lambda: make_job(tmp_path / "run"), "ddp")

    def act(processes: Processes) -> None:
        with pytest.raises(ArtifactError, match='parallel: "ddp" → "fsdp"'):
            train(replace(make_job(tmp_path / "run"), processes=processes))

    in_processes(2, tmp_path, act, parallel="fsdp")


def test_student_when_the_training_ends_then_is_the_model_that_was_saved(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        student = make_deeper_student()
        train(replace(make_job(tmp_path / "run", student=student), processes=processes))
        saved = load_file(newest(tmp_path / "run") / "model.safetensors")
        assert same_weights(saved, weights(student))
        if processes.is_first:
            student.backbone.save_pretrained(tmp_path / "model")

    in_processes(2, tmp_path, act, parallel="fsdp")

    saved = load_file(newest(tmp_path / "run") / "model.safetensors")
    assert same_weights(load_file(tmp_path / "model" / "model.safetensors"), saved)


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_step_in_parts_when_one_process_has_a_loss_that_is_not_finite_then_none_makes_it(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        student = make_deeper_student()
        before = weights(student)
        job = make_job(tmp_path / "run", student=student, rows=toy_rows(8))
        replica: list[Any] = []
        if processes.rank == 1:
            assert student.teacher is not None
            next(iter(student.teacher.head.parameters())).fill_(float("nan"))
        kept = type(processes).replica

        def remember(self: Processes, student: StudentWithObjective) -> Any:
            replica.append(kept(self, student))
            return replica[0]

        type(processes).replica = remember  # type: ignore[method-assign]
        with pytest.raises(NonFiniteError, match="step 1"):
            train(replace(job, processes=processes))
        with replica[0].whole():
            assert same_weights(weights(student), before)

    in_processes(2, tmp_path, act, parallel="fsdp")


def test_training_when_another_process_is_gone_then_says_so(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        replica = processes.replica(make_deeper_student())
        if processes.rank == 1:
            os._exit(0)
        with pytest.raises(WorkerError, match="gone or does not answer") as caught:
            replica.add_gradients(collate(toy_rows(1)), temperature=1.0, kd_ratio=0.5, normaliser=1)
        assert caught.value.exit_code == 8

    in_processes(2, tmp_path, act, parallel="fsdp")


def test_error_of_a_process_itself_when_it_computes_then_is_not_taken_for_another_ones(tmp_path: Path) -> None:
    def fail(*of_hook: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 7 bytes")

    def act(processes: Processes) -> None:
        replica = processes.replica(make_deeper_student())
        replica.module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="7 bytes"):
            replica.add_gradients(collate(toy_rows(1)), temperature=1.0, kd_ratio=0.5, normaliser=1)

    in_processes(2, tmp_path, act, parallel="fsdp")


def test_dev_figures_when_in_parts_then_are_those_of_one_process(tmp_path: Path) -> None:
    def job(name: str) -> TrainingJob:
        student = make_deeper_student(dtype=torch.float64)
        return make_job(tmp_path / name, student=student, evaluates=True, keep_best=True)

    train(job("alone"))
    together(2, tmp_path, lambda: job("parts"))

    alone, parts = read_lines(tmp_path / "alone"), read_lines(tmp_path / "parts")
    assert sum("dev_rouge_l" in line for line in parts) > 3
    for one, other in zip(parts, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
