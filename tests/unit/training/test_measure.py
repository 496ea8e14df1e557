"""Cross entropy of given responses against a plain float64 computation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pocl_cli.models.head import split_model
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.training.measure import measure_cross_entropy

from ...support.training import HARDWARE, STUDENT, TEACHER, make_model, toy_rows, toy_tokenizer

NUM_TOKENS = len(toy_tokenizer())
ROWS = toy_rows(10)
ARCHITECTURES = [{**one, "vocab_size": NUM_TOKENS + 5} for one in (STUDENT, TEACHER)]


def plain_cross_entropy(model: torch.nn.Module, row: TokenisedRow) -> float:
    """Without padding, heads or chunks: full logits over the real tokens, labels shifted here."""
    input_ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(input_ids=input_ids).logits[0, :, :NUM_TOKENS]
    start = len(row.prompt_ids)
    return F.cross_entropy(logits[start - 1 : -1], input_ids[0, start:]).item()


def measure(model, rows=ROWS, budget=4096, memory_mb=512, **changes) -> list[ScoredRecord]:
    hardware = replace(HARDWARE, max_tokens_per_micro_batch=budget, objective_memory_mb=memory_mb)
    return measure_cross_entropy(
        split_model(model), rows, num_real_tokens=NUM_TOKENS, pad_token_id=0, hardware=hardware, **changes
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one["model_type"])
def test_cross_entropy_when_measured_in_float64_then_is_the_plain_one(architecture):
    model = make_model(architecture, 0, dtype=torch.float64)

    measured = measure(model)

    expected = [plain_cross_entropy(model, row) for row in ROWS]
    assert [row.cross_entropy for row in measured] == pytest.approx(expected, rel=1e-12)
    assert max(expected) > 1.1 * min(expected)


def test_cross_entropy_when_measured_in_float32_then_is_the_plain_one_up_to_rounding():
    model = make_model(ARCHITECTURES[0], 0)

    expected = [plain_cross_entropy(model, row) for row in ROWS]
    assert [row.cross_entropy for row in measure(model)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("changes", [{"budget": 1}, {"budget": 60}, {"memory_mb": 1e-6}, {"rows": ROWS[::-1]}])
def test_cross_entropy_when_batches_and_chunks_change_then_stays(changes):
    model = make_model(ARCHITECTURES[0], 0, dtype=torch.float64)
    whole = {row.id: row.cross_entropy for row in measure(model)}

    measured = measure(model, **changes)

    assert [row.id for row in measured] == [row.id for row in changes.get("rows", ROWS)]
    assert {row.id: row.cross_entropy for row in measured} == pytest.approx(whole, rel=1e-12)


def test_counts_when_measured_then_include_the_eos_of_the_response():
    (measured,) = measure(make_model(ARCHITECTURES[0], 0), [TokenisedRow("a", [5, 6, 7], [8, 1])])

    assert (measured.id, measured.num_prompt_tokens, measured.num_response_tokens) == ("a", 3, 2)


def test_model_when_it_was_in_training_mode_then_is_measured_without_dropout_and_gets_its_mode_back():
    model = make_model(ARCHITECTURES[0], 0, dropout=0.5).train()
    evaluated = measure(copy.deepcopy(model).eval())

    assert measure(model) == evaluated
    assert all(module.training for module in model.modules())


def test_progress_when_rows_are_measured_then_counts_each_once():
    finished: list[int] = []

    measure(make_model(ARCHITECTURES[0], 0), budget=60, advance=finished.append)

    assert sum(finished) == len(ROWS)
    assert len(finished) > 1
