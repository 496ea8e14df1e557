"""ROUGE-L is rouge_score's, number for number."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pocl_cli.evaluation.rouge import rouge_l, rouge_l_many

SHARED = Path(os.environ.get("POCL_SHARED") or Path(__file__).parents[4] / "shared")
SCORER = RougeScorer(["rougeL"], use_stemmer=True)

WORDS = [
    "the",
    "a",
    "b",
    "running",
    "runs",
    "ran",
    "generously",
    "dying",
    "skies",
    "2",
    "42",
    "don't",
    "x-ray",
    "ÄPFEL",
    "K",
]
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
# Surrogates are in `st.characters()` only where asked for; broken rows have them.
ANY_TEXT = st.text(st.characters(codec=None), max_size=40)
TEXTS = st.one_of(SENTENCES, ANY_TEXT, st.sampled_from(["", " ", "\x00", "\u2028", "…", "شكرا", "\ud800abc"]))


def _expected(prediction: str, references: list[str]) -> float:
    return float(SCORER.score_multi(references, prediction)["rougeL"].fmeasure)


@settings(deadline=None, max_examples=400)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_rouge_l_when_any_text_then_equals_rouge_score(prediction: str, references: list[str]) -> None:
    assert rouge_l(prediction, references) == _expected(prediction, references)


@settings(deadline=None, max_examples=200)
@given(SENTENCES, SENTENCES)
def test_rouge_l_when_swapped_then_is_the_same_and_within_bounds(one: str, other: str) -> None:
    score = rouge_l(one, [other])
    assert 0 <= score <= 1
    assert score == pytest.approx(rouge_l(other, [one]), abs=1e-15)
    if one.strip():
        assert rouge_l(one, [one]) == 1.0


def test_rouge_l_when_several_references_then_takes_the_best() -> None:
    assert rouge_l("the cat sat", ["a dog", "the cat sat", "the cat"]) == 1.0
    assert rouge_l("the cat sat", ["the cat"]) == pytest.approx(0.8)


def test_rouge_l_when_nothing_is_a_token_then_is_zero() -> None:
    assert rouge_l("", ["answer"]) == rouge_l("answer", [""]) == rouge_l("…", ["…"]) == 0.0


def test_rouge_l_many_when_given_rows_then_scores_each_against_its_own() -> None:
    assert rouge_l_many(["yes", "no"], [["no", "yes"], ["yes"]]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="shorter"):
        rouge_l_many(["yes", "no"], [["yes"]])


def _shared_rows(name: str) -> list[dict[str, Any]]:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is in the shared data folder only (POCL_SHARED)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.shared
def test_rouge_l_when_real_answers_then_equals_rouge_score_and_the_published_mean() -> None:
    answers = [row["text"] for row in _shared_rows("oracle/dolly_eval_answers_seed10.jsonl")]
    references = [[row["output"]] for row in _shared_rows("dolly_eval.jsonl")]
    scores = rouge_l_many(answers, references)
    assert round(100 * sum(scores) / len(scores), 4) == 24.2393
    # Every fourth row: rouge_score needs milliseconds a pair.
    sample = range(0, len(answers), 4)
    assert [scores[row] for row in sample] == [_expected(answers[row], references[row]) for row in sample]


@pytest.mark.shared
def test_rouge_l_when_rows_have_several_references_then_equals_rouge_score() -> None:
    rows = [row for row in _shared_rows("s_ni.jsonl") if len(row["output"]) > 1][:60]
    predictions = [rows[index - 1]["output"][0] for index in range(len(rows))]
    references = [row["output"] for row in rows]
    assert len(rows) > 10
    assert rouge_l_many(predictions, references) == [
        _expected(prediction, of_row) for prediction, of_row in zip(predictions, references, strict=True)
    ]
