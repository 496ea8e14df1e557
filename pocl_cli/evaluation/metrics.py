"""From answers to the numbers of `metrics.json`."""

from __future__ import annotations

import math
import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pocl_cli.errors import NonFiniteError
from pocl_cli.evaluation.rouge import rouge_l
from pocl_cli.records import Record, ScoredRecord, record_of

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_IDS_SHOWN = 5


class CategoryMetric(TypedDict):
    """The mean of a metric over the rows of one category, and their number."""

    mean: float
    num_rows: int


class SeededMetric(TypedDict):
    """What every metric has."""

    mean: float
    std: float | None
    per_seed: dict[str, float]


class Metric(SeededMetric, total=False):
    """One metric on one data set.

    `mean` is over the seeds, `std` the sample standard deviation over them (n − 1): None for fewer than two seeds, as
    one says nothing about spread. `per_seed` is empty where no seed has a part in the number (answers made elsewhere,
    cross entropy). `per_category` is there where the data set has categories.
    """

    per_category: dict[str, CategoryMetric]


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """One answer: `rouge_l` F1 in 0..1; its length in tokens and whether it ended by itself, None without a model."""

    rouge_l: float
    exact_match: bool
    num_tokens: int | None = None
    ended_with_eos: bool | None = None


def normalised(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, with white space folded to single spaces."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` equals one of `references` once both are `normalised`."""
    answer = normalised(prediction)
    return any(answer == normalised(reference) for reference in references)


def score_answers(
    records: Sequence[Record],
    answers: Sequence[str],
    *,
    num_tokens: Sequence[int] | None = None,
    ended_with_eos: Sequence[bool] | None = None,
) -> list[ScoredAnswer]:
    """The answers `[N]` to `records` `[N]`, measured against all references of the same row.

    Args:
        records: the rows.
        answers: the text of each answer.
        num_tokens: length of each answer in the model's tokens; None for answers made elsewhere.
        ended_with_eos: whether each answer ended before the length limit; None for answers made elsewhere.
    """
    unknown = [None] * len(records)
    rows = zip(records, answers, num_tokens or unknown, ended_with_eos or unknown, strict=True)
    return [
        ScoredAnswer(rouge_l(answer, record.references), exact_match(answer, record.references), length, ended)
        for record, answer, length, ended in rows
    ]


def dataset_metrics(
    records: Sequence[Record],
    answers: Mapping[int | None, Sequence[ScoredAnswer]],
    *,
    measured_references: Sequence[ScoredRecord] | None = None,
) -> dict[str, Metric]:
    """All metrics of one data set: what stands under its name in `metrics.json`.

    `rouge_l`, `exact_match` and `ended_with_eos` are × 100, `response_tokens` is tokens an answer, `cross_entropy` is
    nats per response token of the references, over all tokens of the data set. What was not measured is absent.

    Args:
        records: the rows `[N]`, at least one.
        answers: of each decoding seed the answers `[N]` in the order of `records`; under None those of no known seed.
        measured_references: the model's cross entropy on the reference of each row `[N]`; None without a model.

    Raises:
        NonFiniteError: a cross entropy is NaN or infinite.
    """
    assert records, "metrics of no rows"
    assert answers, "metrics of no answers"
    assert all(len(of_seed) == len(records) for of_seed in answers.values()), "one answer a row and seed"
    assert None not in answers or len(answers) == 1, "answers of no known seed stand alone"
    metrics: dict[str, Metric] = {}
    for name, value in _ANSWER_METRICS.items():
        values = {seed: [value(answer) for answer in of_seed] for seed, of_seed in answers.items()}
        known = {seed: [number for number in numbers if number is not None] for seed, numbers in values.items()}
        if all(len(numbers) == len(records) for numbers in known.values()):
            metrics[name] = _over_seeds(records, known)
    if measured_references is not None:
        metrics["cross_entropy"] = _cross_entropy_metric(records, measured_references)
    return metrics


def text_metrics(records: Sequence[Record], measured: Sequence[ScoredRecord]) -> dict[str, Metric]:
    """The metrics of plain text: `cross_entropy` in nats per predicted token, and `perplexity`, its exponential.

    Args:
        records: the documents that the rows are from `[N]`, at least one; a document in pieces stands there often.
        measured: the model's cross entropy on each row `[N]`.

    Raises:
        NonFiniteError: a cross entropy is NaN or infinite.
    """
    assert records, "metrics of no rows"
    cross_entropy = _cross_entropy_metric(records, measured)
    metric = Metric(mean=perplexity(cross_entropy["mean"]), std=None, per_seed={})
    if "per_category" in cross_entropy:
        metric["per_category"] = {
            category: CategoryMetric(mean=perplexity(of_one["mean"]), num_rows=of_one["num_rows"])
            for category, of_one in cross_entropy["per_category"].items()
        }
    return {"cross_entropy": cross_entropy, "perplexity": metric}


def perplexity(cross_entropy: float) -> float:
    """e to the power of a mean in nats per token; infinite where that is more than a float holds."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def mean_cross_entropy(rows: Sequence[ScoredRecord]) -> float:
    """Cross entropy in nats per response token over all tokens of `rows`, at least one.

    Raises:
        NonFiniteError: a row's value is NaN or infinite.
    """
    wrong = [row.id for row in rows if not math.isfinite(row.cross_entropy)]
    if wrong:
        raise NonFiniteError(
            f"cross_entropy of {len(wrong)} of {len(rows)} rows is not a finite number",
            where="the evaluation",
            why=f"rows {', '.join(wrong[:_IDS_SHOWN])}{', …' if len(wrong) > _IDS_SHOWN else ''}",
            fix="look at these rows and at the model's weights",
        )
    num_tokens = sum(row.num_response_tokens for row in rows)
    return math.fsum(row.cross_entropy * row.num_response_tokens for row in rows) / num_tokens


def _rate(value: float | bool | None) -> float | None:
    return None if value is None else 100.0 * value


_ANSWER_METRICS: dict[str, Callable[[ScoredAnswer], float | None]] = {
    "rouge_l": lambda answer: _rate(answer.rouge_l),
    "exact_match": lambda answer: _rate(answer.exact_match),
    "response_tokens": lambda answer: answer.num_tokens,
    "ended_with_eos": lambda answer: _rate(answer.ended_with_eos),
}


def _over_seeds(records: Sequence[Record], values: Mapping[int | None, Sequence[float]]) -> Metric:
    """The metric whose values `[N]` of each seed are given."""
    means = {seed: _mean(numbers) for seed, numbers in values.items()}
    metric = Metric(
        mean=_mean(means.values()),
        std=statistics.stdev(means.values()) if len(means) > 1 else None,
        per_seed={str(seed): mean for seed, mean in means.items() if seed is not None},
    )
    rows_of = _rows_by_category(records)
    if rows_of:
        metric["per_category"] = {
            category: CategoryMetric(
                mean=_mean(_mean(numbers[row] for row in rows) for numbers in values.values()), num_rows=len(rows)
            )
            for category, rows in rows_of.items()
        }
    return metric


def _cross_entropy_metric(records: Sequence[Record], measured: Sequence[ScoredRecord]) -> Metric:
    ids = [record_of(row.id) for row in measured]
    assert ids == [record.id for record in records], "one measurement a row, in its order"
    metric = Metric(mean=mean_cross_entropy(measured), std=None, per_seed={})
    rows_of = _rows_by_category(records)
    if rows_of:
        metric["per_category"] = {
            category: CategoryMetric(mean=mean_cross_entropy([measured[row] for row in rows]), num_rows=len(rows))
            for category, rows in rows_of.items()
        }
    return metric


def _rows_by_category(records: Sequence[Record]) -> dict[str, list[int]]:
    """Row positions of every category, by name; rows without one are in none."""
    rows_of: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        if record.category is not None:
            rows_of.setdefault(record.category, []).append(row)
    return dict(sorted(rows_of.items()))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
