"""The numbers of a run do not depend on how a batch is split: loss and gradient norm of every step stay."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from pocl_cli.models.head import HeadedModel
from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import train
from pocl_cli.training.sampler import Sampler, micro_batches

from ..support.folders import memory_folder
from ..support.training import make_job, make_student, toy_rows, train_lines

BATCH, STEPS = 8, 20
# Lengths so alike that a budget in tokens cuts batches of 8 into micro-batches of exactly 8, 4 or 1 rows.
LONGEST, SHORTEST = 20, 17
BUDGETS = {"1x8": 8 * LONGEST, "2x4": 4 * LONGEST, "8x1": 1}
ROWS = [row for row in toy_rows(60) if SHORTEST <= row.num_tokens <= LONGEST][: 2 * BATCH]
STAGES = [
    Stage(0, tuple(row.id for row in ROWS[:BATCH]), 8, 1.0, 0.7),
    Stage(1, tuple(row.id for row in ROWS), 6, 2.0, 0.9),
]


@cache
def numbers(
    method: str, *, dtype: torch.dtype = torch.float64, budget: int = BUDGETS["1x8"], memory_mb: float = 512
) -> list[float]:
    """Loss and gradient norm of each of the 20 steps."""
    student = make_student(method, dtype=dtype, memory_mb=memory_mb)
    with memory_folder() as folder:
        train(
            make_job(
                folder,
                student=student,
                rows=ROWS,
                stages=STAGES,
                global_batch_size=BATCH,
                max_tokens_per_micro_batch=budget,
            )
        )
        return [line[key] for line in train_lines(folder) for key in ("loss", "grad_norm")]


@pytest.mark.parametrize(("name", "sizes"), [("1x8", [8]), ("2x4", [4, 4]), ("8x1", [1] * 8)])
def test_budget_when_a_batch_is_split_by_it_then_gives_these_micro_batches(name, sizes):
    by_id = {row.id: row for row in ROWS}
    for stage in STAGES:
        sampler = Sampler(stage, seed=7, global_batch_size=BATCH, drop_last=False)
        for step in range(sampler.steps_per_epoch * stage.epochs):
            batch: list[TokenisedRow] = [by_id[record_id] for record_id in sampler.global_batch(step)]
            assert [len(group) for group in micro_batches(batch, BUDGETS[name])] == sizes
    assert len({len(row.response_ids) for row in ROWS}) > 1, "a mean of means would be another loss"
    assert len({row.num_tokens for row in ROWS}) > 1, "there is padding"


@pytest.mark.parametrize("method", kd_methods.names())
def test_run_when_batches_are_split_otherwise_then_has_the_same_losses_and_gradient_norms(method):
    whole = numbers(method)

    for name in ("2x4", "8x1"):
        assert numbers(method, budget=BUDGETS[name]) == pytest.approx(whole, rel=1e-10)

    assert len(whole) == 2 * STEPS
    assert min(whole) > 0


@pytest.mark.parametrize("method", kd_methods.names())
def test_run_when_rows_are_padded_then_has_the_same_losses_and_gradient_norms(method, monkeypatch):
    packed = numbers(method)
    monkeypatch.setattr(HeadedModel, "packs", False)

    padded = numbers.__wrapped__(method)

    assert padded == pytest.approx(packed, rel=1e-10)
    assert padded != packed, "rounding tells that the rows lay otherwise"


@pytest.mark.parametrize("method", kd_methods.names())
def test_run_when_the_objective_works_in_other_chunks_then_has_the_same_losses_and_gradient_norms(method):
    whole = numbers(method)
    few_tokens = make_student(method, memory_mb=0.11).chunk_tokens

    chunked = numbers(method, memory_mb=0.11)

    assert few_tokens == 4
    assert chunked == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("method", ["fkl", "srkl"])
@pytest.mark.parametrize("changes", [{"budget": BUDGETS["2x4"]}, {"budget": 1}, {"memory_mb": 0.1}])
def test_run_in_float32_when_it_is_split_otherwise_then_has_the_same_numbers_up_to_rounding(method, changes):
    whole = numbers(method, dtype=torch.float32)

    split = numbers(method, dtype=torch.float32, **changes)

    assert split == pytest.approx(whole, rel=1e-5)


def test_run_in_float32_when_compared_with_float64_then_differs_by_rounding_only():
    exact = numbers("fkl")

    assert numbers("fkl", dtype=torch.float32) == pytest.approx(exact, rel=1e-4)
