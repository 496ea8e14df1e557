"""Cross entropy of given responses against a plain float64 computation, and in one pass with answers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pocl_cli.errors import NonFiniteError
from pocl_cli.models.generate import Generated, generate
from pocl_cli.models.head import split_model
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.schema import DecodingConfig
from pocl_cli.training.measure import measure_and_generate, measure_cross_entropy

from ...support.training import HARDWARE, STUDENT, TEACHER, make_model, toy_rows, toy_tokenizer

NUM_TOKENS = len(toy_tokenizer())
ROWS = toy_rows(10)
WINDOWED = {**TEACHER, "model_type": "mistral", "sliding_window": 6}
SEEDS = [[100 * place + seed for seed in range(1 + place % 3)] for place in range(len(ROWS))]
DECODING = DecodingConfig(sampling_temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=3, max_new_tokens=9)
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
    return measure_cross_entropy(split_model(model), rows, num_real_tokens=NUM_TOKENS, hardware=hardware, **changes)


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


def measure_in_one_pass(
    model, rows=ROWS, seeds=SEEDS, budget=4096, **changes: Any
) -> tuple[list[ScoredRecord], list[list[Generated]]]:
    hardware = replace(HARDWARE, max_tokens_per_micro_batch=budget)
    given: dict[str, Any] = {"decoding": DECODING, "eos_token_ids": [1, 7], "context_length": 64, "pad_token_id": 0}
    return measure_and_generate(
        split_model(model), rows, seeds=seeds, num_real_tokens=NUM_TOKENS, hardware=hardware, **given, **changes
    )


@pytest.mark.parametrize("budget", [1, 10, 60, 4096])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WINDOWED], ids=lambda one: one["model_type"])
def test_one_pass_when_compared_with_two_then_gives_the_same_cross_entropy_and_answers(architecture, budget):
    model = make_model(architecture, 0, dtype=torch.float64)
    apart = generate(
        split_model(model),
        [row.prompt_ids for row in ROWS],
        seeds=SEEDS,
        decoding=DECODING,
        eos_token_ids=[1, 7],
        pad_token_id=0,
        max_tokens_per_batch=4096,
        context_length=64,
        vocabulary_size=NUM_TOKENS,
    )

    measured, answers = measure_in_one_pass(model, budget=budget)

    assert [(row.id, row.num_prompt_tokens, row.num_response_tokens) for row in measured] == [
        (row.id, len(row.prompt_ids), len(row.response_ids)) for row in ROWS
    ]
    assert [row.cross_entropy for row in measured] == pytest.approx(
        [row.cross_entropy for row in measure(model)], rel=1e-12
    )
    assert answers == apart
    assert {one.ended for its_answers in answers for one in its_answers} == {False, True}


def test_one_pass_when_it_reads_prompts_then_reads_each_once():
    model = make_model(ARCHITECTURES[0], 0)
    read: list[int] = []

    def count(module: object, inputs: tuple[torch.Tensor], output: object) -> None:
        # Longer than in the comparisons with the model's own numbers, one of which has all rows in one sequence.
        if inputs[0].shape[1] > 12 and len(inputs[0]) > 1:
            read.append(len(inputs[0]))

    model.get_input_embeddings().register_forward_hook(count)
    measure_in_one_pass(model, budget=120)

    assert sum(read) == len(ROWS)


def test_one_pass_when_rows_come_in_another_order_then_each_has_the_same():
    model = make_model(ARCHITECTURES[1], 0, dtype=torch.float64)
    measured, answers = measure_in_one_pass(model)

    again, backwards = measure_in_one_pass(model, rows=ROWS[::-1], seeds=SEEDS[::-1], budget=100)

    assert backwards[::-1] == answers
    assert [row.cross_entropy for row in again[::-1]] == pytest.approx(
        [row.cross_entropy for row in measured], rel=1e-12
    )


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, WINDOWED], ids=lambda one: one["model_type"])
def test_one_pass_when_the_model_gives_no_finite_numbers_then_is_refused_with_the_records(architecture):
    model = make_model(architecture, 0)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=rf"records .*\b{ROWS[0].id}\b"):
        measure_in_one_pass(model)
