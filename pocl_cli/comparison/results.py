"""The rows of a comparison: one for every data set, method and arm."""

from __future__ import annotations

import math
import statistics as averages
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from pocl_cli.comparison import statistics
from pocl_cli.comparison.arms import Cell
from pocl_cli.comparison.matching import mean_spent, mismatches
from pocl_cli.comparison.outcome import ANSWER_METRICS, DEV_METRICS, Outcome

if TYPE_CHECKING:
    from pocl_cli.schema import ComparisonConfig


class Figure(TypedDict):
    """A number of an arm: its mean over the training seeds, and their sample standard deviation (None for one)."""

    mean: float
    std: float | None
    per_seed: dict[str, float]


class Difference(TypedDict):
    """The arm less the baseline, answer by answer of the same prompt and training seed.

    `low` and `high` are an interval over training seeds and prompts. The p-values are two-sided: `p_prompts` flips
    signs prompt by prompt, `p_seeds` training seed by training seed; `…_holm` are adjusted over all rows of the metric.
    """

    mean: float
    low: float | None
    high: float | None
    p_prompts: float
    p_prompts_holm: float
    p_seeds: float
    p_seeds_holm: float
    wins: int
    ties: int
    losses: int


class Row(TypedDict):
    """One arm with one method on one data set. `differences` is empty for the baseline.

    `groups` holds the ROUGE-L of each group of rows: the levels of categories named "family/level", or the categories.
    """

    dataset: str
    method: str
    arm: str
    figures: dict[str, Figure]
    groups: dict[str, Figure]
    differences: dict[str, Difference]
    steps: int
    response_tokens: int | None
    train_seconds: float


def compare(outcomes: Mapping[Cell, Outcome], comparison: ComparisonConfig) -> list[Row]:
    """Data set by data set, method by method, the arms in their order."""
    methods = list(dict.fromkeys(cell.method for cell in outcomes))
    datasets = list(next(iter(outcomes.values())).answers)
    rows = []
    for dataset in datasets:
        for method in methods:
            runs = {arm: [outcomes[Cell(method, arm, seed)] for seed in comparison.seeds] for arm in comparison.chosen}
            baseline = runs[comparison.baseline]
            for arm, of_arm in runs.items():
                row = _row(dataset, of_arm)
                if arm != comparison.baseline:
                    row["differences"] = {
                        metric: _difference(differences(of_arm, baseline, dataset, metric), comparison)
                        for metric in ANSWER_METRICS
                    }
                rows.append(row)
    for metric in ANSWER_METRICS:
        _adjust([row["differences"][metric] for row in rows if row["differences"]])
    return rows


def differences(arm: Sequence[Outcome], baseline: Sequence[Outcome], dataset: str, metric: str) -> statistics.Floats:
    """The arm less the baseline `[S, P]`, runs of the same training seed and answers to the same prompt paired."""
    pairs = zip(arm, baseline, strict=True)
    return np.array(
        [one.answers[dataset].values[metric] - other.answers[dataset].values[metric] for one, other in pairs]
    )


def matching(outcomes: Mapping[Cell, Outcome], comparison: ComparisonConfig) -> dict[str, dict[str, list[str]]]:
    """By method and arm: where the arm does not match the baseline in what it spends."""
    found: dict[str, dict[str, list[str]]] = {}
    for method in dict.fromkeys(cell.method for cell in outcomes):
        spent = {
            arm: mean_spent([outcomes[Cell(method, arm, seed)].spent for seed in comparison.seeds])
            for arm in comparison.chosen
        }
        found[method] = {arm: mismatches(one, spent[comparison.baseline]) for arm, one in spent.items()}
    return found


def _row(dataset: str, runs: Sequence[Outcome]) -> Row:
    cell = runs[0].cell
    tokens = [run.spent.response_tokens for run in runs if run.spent.response_tokens is not None]
    return Row(
        dataset=dataset,
        method=cell.method,
        arm=cell.arm,
        figures=_figures(dataset, runs),
        groups=_groups(dataset, runs),
        differences={},
        steps=runs[0].spent.num_steps,
        response_tokens=round(averages.fmean(tokens)) if tokens else None,
        train_seconds=averages.fmean(run.train_seconds for run in runs),
    )


def _figures(dataset: str, runs: Sequence[Outcome]) -> dict[str, Figure]:
    """The means of metrics.json, and the dev figures where every run has them."""
    names = runs[0].metrics[dataset]
    figures = {name: figure({run.cell.seed: run.metrics[dataset][name]["mean"] for run in runs}) for name in names}
    for name in DEV_METRICS:
        if all(name in run.dev for run in runs):
            figures[name] = figure({run.cell.seed: run.dev[name] for run in runs})
    return figures


def figure(by_seed: Mapping[int, float]) -> Figure:
    """A number that is known for every training seed."""
    values = list(by_seed.values())
    std = averages.stdev(values) if len(values) > 1 else None
    return Figure(mean=averages.fmean(values), std=std, per_seed={str(seed): one for seed, one in by_seed.items()})


def _groups(dataset: str, runs: Sequence[Outcome]) -> dict[str, Figure]:
    of_runs = [_levels(run.metrics[dataset]["rouge_l"].get("per_category", {})) for run in runs]
    return {
        name: figure({run.cell.seed: levels[name] for run, levels in zip(runs, of_runs, strict=True)})
        for name in of_runs[0]
    }


def _levels(per_category: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each level over its rows; of each category where they are not named "family/level"."""
    leveled = bool(per_category) and all("/" in name for name in per_category)
    parts: dict[str, list[Mapping[str, float]]] = {}
    for name, category in per_category.items():
        parts.setdefault(name.rpartition("/")[2] if leveled else name, []).append(category)
    return {name: _weighted(categories) for name, categories in parts.items()}


def _weighted(categories: Iterable[Mapping[str, float]]) -> float:
    known = list(categories)
    return math.fsum(one["mean"] * one["num_rows"] for one in known) / math.fsum(one["num_rows"] for one in known)


def _difference(differences_SP: statistics.Floats, comparison: ComparisonConfig) -> Difference:
    drawn = {"num_resamples": comparison.num_resamples, "seed": comparison.resampling_seed}
    interval = statistics.bootstrap_interval(differences_SP, confidence=comparison.confidence, **drawn)
    p_prompts = statistics.p_over_prompts(differences_SP, **drawn)
    p_seeds = statistics.p_over_seeds(differences_SP, **drawn)
    counts = statistics.outcomes(differences_SP)
    return Difference(
        mean=float(differences_SP.mean()),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        p_prompts=p_prompts,
        p_prompts_holm=p_prompts,
        p_seeds=p_seeds,
        p_seeds_holm=p_seeds,
        wins=counts.wins,
        ties=counts.ties,
        losses=counts.losses,
    )


def _adjust(of_metric: Sequence[Difference]) -> None:
    """Puts Holm's adjustment over all rows of a metric in its place."""
    prompts = statistics.holm([one["p_prompts"] for one in of_metric])
    seeds = statistics.holm([one["p_seeds"] for one in of_metric])
    for one, p_prompts, p_seeds in zip(of_metric, prompts, seeds, strict=True):
        one["p_prompts_holm"], one["p_seeds_holm"] = p_prompts, p_seeds
