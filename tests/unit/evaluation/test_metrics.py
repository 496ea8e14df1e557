"""Exact match and the numbers of metrics.json."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from pocl_cli.errors import NonFiniteError
from pocl_cli.evaluation.metrics import (
    ScoredAnswer,
    dataset_metrics,
    exact_match,
    mean_cross_entropy,
    normalised,
    score_answers,
)
from pocl_cli.records import Record, ScoredRecord

SHARED = Path(os.environ.get("POCL_SHARED") or Path(__file__).parents[4] / "shared")

RECORDS = [
    Record(id="a", instruction="?", input="", references=("the cat sat",), category="open"),
    Record(id="b", instruction="?", input="", references=("no", "never"), category="closed"),
    Record(id="c", instruction="?", input="", references=("a dog",), category="open"),
    Record(id="d", instruction="?", input="", references=("two",)),
]


def _measured(cross_entropies: list[float], num_tokens: list[int]) -> list[ScoredRecord]:
    return [
        ScoredRecord(id=record.id, num_prompt_tokens=1, num_response_tokens=length, cross_entropy=value)
        for record, value, length in zip(RECORDS, cross_entropies, num_tokens, strict=True)
    ]


def _seed(answers: list[str], num_tokens: list[int], ended: list[bool]) -> list[ScoredAnswer]:
    return score_answers(RECORDS, answers, num_tokens=num_tokens, ended_with_eos=ended)


TWO_SEEDS: dict[int | None, list[ScoredAnswer]] = {
    10: _seed(["The cat sat.", "Never!", "a", "x"], [4, 2, 1, 9], [True, True, True, False]),
    20: _seed(["the cat", "yes", "a dog", "x"], [2, 1, 3, 9], [True, True, True, False]),
}


@pytest.mark.parametrize(
    ("prediction", "references", "matches"),
    [
        ("The  Cat\tsat.\n", ["the cat sat"], True),
        ("It's 4-2!", ["its 42"], True),
        ("never", ["no", "Never."], True),
        ("the cat", ["cat"], False),
        ("", ["!?"], True),
        ("Äpfel", ["äpfel"], True),
        ("a\u00a0b", ["a b"], True),
        ("yes", ["yes yes"], False),
    ],
)
def test_exact_match_when_only_case_punctuation_or_space_differ_then_matches(
    prediction: str, references: list[str], matches: bool
) -> None:
    assert exact_match(prediction, references) is matches


def test_normalised_when_applied_twice_then_changes_nothing_more() -> None:
    text = "  A -- B,\n\nc's  "
    assert normalised(text) == "a b cs"
    assert normalised(normalised(text)) == normalised(text)


def test_score_answers_when_a_length_differs_then_refuses() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_answers(RECORDS, ["one", "two"])


def test_metrics_when_two_seeds_then_has_means_of_the_seeds_and_their_spread() -> None:
    metrics = dataset_metrics(RECORDS, TWO_SEEDS)
    first, second = 100 * (1 + 1 + 2 / 3 + 0) / 4, 100 * (0.8 + 0 + 1 + 0) / 4
    assert metrics["rouge_l"]["per_seed"] == {"10": pytest.approx(first), "20": pytest.approx(second)}
    assert metrics["rouge_l"]["mean"] == pytest.approx((first + second) / 2)
    assert metrics["rouge_l"]["std"] == pytest.approx(statistics.stdev([first, second]))
    assert metrics["exact_match"]["per_seed"] == {"10": 50.0, "20": 25.0}
    assert metrics["response_tokens"]["per_seed"] == {"10": 4.0, "20": 3.75}
    assert metrics["ended_with_eos"]["mean"] == 75.0
    assert "cross_entropy" not in metrics


def test_metrics_when_rows_have_categories_then_has_the_mean_of_each() -> None:
    per_category = dataset_metrics(RECORDS, TWO_SEEDS)["exact_match"]["per_category"]
    assert per_category == {"closed": {"mean": 50.0, "num_rows": 1}, "open": {"mean": 50.0, "num_rows": 2}}
    plain = [replace(record, category=None) for record in RECORDS]
    assert "per_category" not in dataset_metrics(plain, TWO_SEEDS)["exact_match"]


def test_metrics_when_one_seed_then_claims_no_spread() -> None:
    metric = dataset_metrics(RECORDS, {10: TWO_SEEDS[10]})["exact_match"]
    assert (metric["mean"], metric["std"], metric["per_seed"]) == (50.0, None, {"10": 50.0})


def test_metrics_when_answers_were_made_elsewhere_then_has_what_needs_no_model() -> None:
    answers = score_answers(RECORDS, ["The cat sat.", "Never!", "a", "x"])
    metrics = dataset_metrics(RECORDS, {None: answers})
    assert sorted(metrics) == ["exact_match", "rouge_l"]
    assert metrics["exact_match"]["per_seed"] == metrics["rouge_l"]["per_seed"] == {}
    assert (metrics["exact_match"]["mean"], metrics["exact_match"]["std"]) == (50.0, None)


def test_metrics_when_references_were_measured_then_cross_entropy_is_over_all_tokens() -> None:
    measured = _measured([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 5])
    metric = dataset_metrics(RECORDS, TWO_SEEDS, measured_references=measured)["cross_entropy"]
    assert metric["mean"] == mean_cross_entropy(measured) == 26 / 8
    assert (metric["std"], metric["per_seed"]) == (None, {})
    assert metric["per_category"] == {"closed": {"mean": 2.0, "num_rows": 1}, "open": {"mean": 2.0, "num_rows": 2}}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metrics_when_a_cross_entropy_is_not_finite_then_names_the_row(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"1 of 4 rows.*rows c"):
        dataset_metrics(RECORDS, TWO_SEEDS, measured_references=_measured([1.0, 2.0, bad, 4.0], [1, 1, 1, 5]))


def test_metrics_when_written_then_are_json_that_reads_back_the_same() -> None:
    metrics = dataset_metrics(RECORDS, TWO_SEEDS, measured_references=_measured([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 5]))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@pytest.mark.shared
def test_metrics_when_the_published_answers_then_has_the_published_numbers() -> None:
    files = [SHARED / "data" / name for name in ("dolly_eval.jsonl", "oracle/dolly_eval_answers_seed10.jsonl")]
    if not all(path.exists() for path in files):
        pytest.skip("the published answers are in the shared data folder only (POCL_SHARED)")
    rows, answers = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files)
    records = [
        Record(id=str(index), instruction=row["instruction"], input=row["input"], references=(row["output"],))
        for index, row in enumerate(rows)
    ]
    metrics = dataset_metrics(records, {None: score_answers(records, [answer["text"] for answer in answers])})
    assert round(metrics["rouge_l"]["mean"], 4) == 24.2393
    assert metrics["exact_match"]["mean"] == pytest.approx(2.8)
