"""Several processes: each one's share of a batch, and training together as one process would have trained alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ArtifactError, NonFiniteError, WorkerError
from pocl_cli.records import TokenisedRow
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.parallel import Processes
from pocl_cli.training.replica import _buckets
from pocl_cli.training.sampler import share

from ...support.processes import in_processes
from ...support.training import make_job, make_student, read_consumed, toy_rows, train_lines

# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_rows(lengths: list[int]) -> list[TokenisedRow]:
    return [TokenisedRow(f"r{i:03d}", [1] * (length - 1), [2]) for i, length in enumerate(lengths)]


lengths = st.lists(st.integers(2, 500), max_size=40)
sizes = st.integers(1, 9)


@given(lengths, sizes)
def test_shares_when_put_together_then_are_the_batch(lengths: list[int], size: int) -> None:
    rows = make_rows(lengths)
    dealt = [row.id for rank in range(size) for row in share(rows, rank, size)]
    assert sorted(dealt) == [row.id for row in rows]


@given(lengths, sizes)
def test_shares_when_compared_then_differ_by_the_longest_row_at_most(lengths: list[int], size: int) -> None:
    tokens = [sum(row.num_tokens for row in share(make_rows(lengths), rank, size)) for rank in range(size)]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@given(lengths, sizes, st.randoms())
def test_share_when_the_batch_is_in_another_order_then_is_the_same(lengths: list[int], size: int, random: Any) -> None:
    rows = make_rows(lengths)
    shuffled = random.sample(rows, len(rows))
    assert [share(shuffled, rank, size) for rank in range(size)] == [share(rows, rank, size) for rank in range(size)]


@given(st.lists(st.integers(1, 2**24), max_size=30))
def test_buckets_when_put_together_then_are_the_gradients_in_order_and_each_is_small(numbers: list[int]) -> None:
    gradients = [torch.empty(number, device="meta") for number in numbers]
    buckets = list(_buckets(gradients))
    assert [len(one) for bucket in buckets for one in bucket] == numbers
    assert all(len(bucket) == 1 or sum(one.nbytes for one in bucket) <= 2**25 for bucket in buckets)


# ── the same numbers ──────────────────────────────────────────────────────────────────────────────────────────────


def together(size: int, folder: Path, job: Callable[[], TrainingJob]) -> None:
    """Trains the job in several processes."""
    in_processes(size, folder, lambda processes: train(replace(job(), processes=processes)))


@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [("jsd", torch.float32, 1e-5), ("jsd", torch.float64, 1e-10), ("taid", torch.float64, 1e-10)],
)
@pytest.mark.parametrize("micro_batch", [4096, 60])
def test_losses_and_gradient_norms_when_two_processes_train_then_are_those_of_one(
    tmp_path: Path, method: str, dtype: torch.dtype, tolerance: float, micro_batch: int
) -> None:
    def job(name: str, **changes: Any) -> TrainingJob:
        student = make_student(method, dtype=dtype)
        return make_job(
            tmp_path / name, student=student, global_batch_size=3, evaluates=True, keep_best=True, **changes
        )

    train(job("one"))
    together(2, tmp_path, lambda: job("two", max_tokens_per_micro_batch=micro_batch))

    one, two = train_lines(tmp_path / "one"), train_lines(tmp_path / "two")
    assert len(one) == len(two) == 12
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=tolerance)
    assert read_consumed(tmp_path / "two") == read_consumed(tmp_path / "one")


def test_losses_and_gradient_norms_when_processes_have_no_row_then_are_those_of_one(tmp_path: Path) -> None:
    def job(name: str) -> TrainingJob:
        return make_job(
            tmp_path / name, student=make_student(dtype=torch.float64), rows=toy_rows(6), global_batch_size=2
        )

    train(job("one"))
    together(3, tmp_path, lambda: job("three"))

    one, three = train_lines(tmp_path / "one"), train_lines(tmp_path / "three")
    assert len(one) == len(three) > 5
    for alone, shared in zip(one, three, strict=True):
        assert shared == pytest.approx(alone, rel=1e-10)


def test_parameter_when_no_process_has_a_gradient_for_it_then_stays_as_it_was(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        job = make_job(tmp_path / "run", max_steps=2, weight_decay=0.5)
        unused = torch.nn.Parameter(torch.ones(2, 2))
        job.student.register_parameter("unused", unused)
        train(replace(job, processes=processes))
        assert torch.equal(unused, torch.ones(2, 2))

    in_processes(2, tmp_path, act)


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────────────


def results(folder: Path) -> dict[str, str]:
    newest = max(path for path in (folder / "checkpoints").iterdir() if path.name[0].isdigit())
    files = [newest / "model.safetensors", folder / "metrics.jsonl", folder / "consumed.parquet"]
    return {path.name: sha256_file(path) for path in files}


def test_run_of_three_processes_when_killed_then_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def job(name: str, kills: bool = False) -> TrainingJob:
        def track(values: Any, step: int) -> None:
            if kills and step == 7:
                os._exit(0)  # the others find out by themselves

        made = make_job(
            tmp_path / name,
            student=make_student(dropout=0.1),
            evaluates=True,
            keep_best=True,
            checkpoint_every=2,
            track=track,
        )
        return made

    together(3, tmp_path, lambda: job("undisturbed"))
    with pytest.raises(AssertionError):
        together(3, tmp_path, lambda: job("killed", kills=True))
    together(3, tmp_path, lambda: job("killed"))

    assert results(tmp_path / "killed") == results(tmp_path / "undisturbed")


def test_run_when_begun_with_another_number_of_processes_then_is_refused(tmp_path: Path) -> None:
    together(2, tmp_path, lambda: make_job(tmp_path / "run"))

    with pytest.raises(ArtifactError, match="num_processes: 2 → 1") as caught:
        train(make_job(tmp_path / "run"))

    assert caught.value.exit_code == 4


# ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_step_when_one_process_has_a_loss_that_is_not_finite_then_none_makes_it(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        job = make_job(tmp_path / "run", rows=toy_rows(8), global_batch_size=4)
        before = {name: value.clone() for name, value in job.student.named_parameters()}
        if processes.rank == 1:
            next(iter(job.student.teacher.head.parameters())).fill_(float("nan"))
        try:
            train(replace(job, processes=processes))
        except NonFiniteError as error:
            assert "step 1" in str(error)
            assert all(torch.equal(value, before[name]) for name, value in job.student.named_parameters())
        else:
            raise AssertionError("the step was made")

    in_processes(2, tmp_path, act)


def test_process_when_another_one_is_gone_then_says_so(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        if processes.rank == 1:
            os._exit(0)
        with pytest.raises(WorkerError, match="gone or does not answer") as caught:
            processes.barrier()
        assert caught.value.exit_code == 8

    in_processes(2, tmp_path, act)


def test_processes_when_they_would_go_on_from_different_checkpoints_then_stop(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        with pytest.raises(WorkerError, match="disagree about the step"):
            processes.agree_on("the step", 4 + processes.rank // 2)

    in_processes(3, tmp_path, act)


def test_files_when_two_processes_train_then_are_written_by_the_first_alone(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        folder = tmp_path / f"rank-{processes.rank}"
        if processes.rank == 1:  # what it reads is what the first has written
            folder.symlink_to(tmp_path / "rank-0")
        job = make_job(folder, track=lambda values, step: (tmp_path / f"tracked-{os.getpid()}").touch())
        train(replace(job, processes=processes))

    in_processes(2, tmp_path, act)

    assert len(list(tmp_path.glob("tracked-*"))) == 1
    lines = [json.loads(line) for line in (tmp_path / "rank-0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
