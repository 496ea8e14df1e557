"""Intervals and p-values against slow restatements, scipy's own answers, and what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from pocl_cli.comparison import statistics
from pocl_cli.comparison.statistics import Floats

DRAWN = {"num_resamples": 999, "seed": 0}


def drawn(num_seeds: int, num_prompts: int, *, between_seeds: float, between_prompts: float, seed: int) -> Floats:
    """Differences around 0 with a part a training seed, a part a prompt, and a part of their own."""
    generator = np.random.default_rng(seed)
    of_seeds = between_seeds * generator.standard_normal((num_seeds, 1))
    of_prompts = between_prompts * generator.standard_normal((1, num_prompts))
    return of_seeds + of_prompts + generator.standard_normal((num_seeds, num_prompts))


# ── the interval ──────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_interval(differences: Floats, confidence: float, num_resamples: int) -> tuple[float, float]:
    """The same bootstrap, one resample at a time."""
    generator = np.random.default_rng(1)
    values = statistics.widened(differences, confidence)
    num_seeds, num_prompts = values.shape
    means = [
        values[generator.integers(num_seeds, size=num_seeds)][
            :, generator.integers(num_prompts, size=num_prompts)
        ].mean()
        for _ in range(num_resamples)
    ]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@pytest.mark.parametrize("shape", [(4, 30), (1, 40), (6, 1)])
def test_interval_when_drawn_one_resample_at_a_time_then_is_the_same(shape: tuple[int, int]) -> None:
    differences = drawn(*shape, between_seeds=1, between_prompts=1, seed=3)
    found = statistics.bootstrap_interval(differences, confidence=0.9, num_resamples=20_000, seed=0)
    slow = slow_interval(differences, 0.9, 20_000)
    assert found == pytest.approx(slow, abs=0.03 * (slow[1] - slow[0]))


def test_interval_when_there_is_one_seed_then_is_the_ordinary_bootstrap_of_scipy() -> None:
    differences = drawn(1, 50, between_seeds=1, between_prompts=1, seed=4)
    found = statistics.bootstrap_interval(differences, confidence=0.95, num_resamples=999, seed=7)
    expected = stats.bootstrap(
        (differences[0],), np.mean, n_resamples=999, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert found == pytest.approx(tuple(expected))


def test_interval_when_all_differences_are_equal_then_is_a_point() -> None:
    found = statistics.bootstrap_interval(np.full((3, 20), 1.5), confidence=0.95, **DRAWN)
    assert found == pytest.approx((1.5, 1.5))


def test_interval_when_there_is_one_difference_then_there_is_none() -> None:
    assert statistics.bootstrap_interval(np.array([[1.0]]), confidence=0.95, **DRAWN) is None


def test_interval_when_asked_twice_then_is_the_same_and_another_seed_gives_another() -> None:
    differences = drawn(3, 20, between_seeds=1, between_prompts=1, seed=5)
    found = [
        statistics.bootstrap_interval(differences, confidence=0.95, num_resamples=200, seed=seed) for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


def test_widened_when_seeds_deviate_then_keeps_the_mean_and_stretches_them_by_the_quantiles_of_t() -> None:
    differences = drawn(5, 40, between_seeds=2, between_prompts=1, seed=6)
    widened = statistics.widened(differences, 0.95)
    factor = math.sqrt(5 / 4) * 2.7764 / 1.95996  # the quantiles of t (4 degrees of freedom) and normal, from a table
    assert widened.mean() == pytest.approx(differences.mean())
    assert (widened.mean(axis=1) - widened.mean()) == pytest.approx(
        factor * (differences.mean(axis=1) - differences.mean()), rel=1e-4
    )
    assert (widened - widened.mean(axis=1, keepdims=True)) == pytest.approx(
        differences - differences.mean(axis=1, keepdims=True)
    )


@pytest.mark.parametrize(
    ("num_seeds", "between_seeds", "between_prompts", "least"),
    [(3, 1.0, 0.0, 0.85), (5, 1.0, 0.5, 0.9), (5, 0.0, 2.0, 0.9)],
)
def test_interval_when_the_truth_is_known_then_it_is_covered_about_as_often_as_promised(
    num_seeds: int, between_seeds: float, between_prompts: float, least: float
) -> None:
    covered = 0
    for seed in range(200):
        differences = drawn(num_seeds, 60, between_seeds=between_seeds, between_prompts=between_prompts, seed=seed)
        found = statistics.bootstrap_interval(differences, confidence=0.95, num_resamples=400, seed=seed)
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert least <= covered / 200 <= 1.0


# ── p-values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def slow_p(values: Floats) -> float:
    """The share of all sign flips whose sum is at least as far from zero."""
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return float(np.mean([one >= abs(values.sum()) - 1e-12 for one in sums]))


def test_p_over_prompts_when_there_are_few_then_is_the_exact_share_of_sign_flips() -> None:
    differences = drawn(3, 9, between_seeds=0, between_prompts=1, seed=8) + 0.5
    found = statistics.p_over_prompts(differences, **DRAWN)
    assert found == pytest.approx(slow_p(differences.mean(axis=0)))


def test_p_over_seeds_when_there_are_few_then_is_the_exact_share_of_sign_flips() -> None:
    differences = drawn(6, 20, between_seeds=1, between_prompts=1, seed=9) + 0.5
    found = statistics.p_over_seeds(differences, **DRAWN)
    assert found == pytest.approx(slow_p(differences.mean(axis=1)))


@pytest.mark.parametrize(("num_seeds", "least"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625)])
def test_p_over_seeds_when_all_seeds_agree_then_is_the_least_that_so_many_can_give(
    num_seeds: int, least: float
) -> None:
    found = statistics.p_over_seeds(np.full((num_seeds, 10), 3.0), **DRAWN)
    assert found == pytest.approx(least)
    assert statistics.least_p_over_seeds(num_seeds) == least


def test_p_over_prompts_when_there_are_many_then_is_close_to_that_of_a_t_test() -> None:
    differences = drawn(1, 400, between_seeds=0, between_prompts=0, seed=10) + 0.1
    found = statistics.p_over_prompts(differences, num_resamples=9999, seed=0)
    assert found == pytest.approx(stats.ttest_1samp(differences[0], 0).pvalue, abs=0.01)


def test_p_when_nothing_differs_then_is_one() -> None:
    assert statistics.p_over_prompts(np.zeros((3, 50)), **DRAWN) == 1.0
    assert statistics.p_over_seeds(np.zeros((3, 50)), **DRAWN) == 1.0


def test_p_over_prompts_when_the_seeds_alone_differ_then_calls_it_sure_and_p_over_seeds_does_not() -> None:
    """Why both stand in the table: many prompts make the noise of two training seeds look like a finding."""
    differences = np.array([[0.5], [3.0]]) + 0.1 * drawn(2, 200, between_seeds=0, between_prompts=1, seed=11)
    assert statistics.p_over_prompts(differences, **DRAWN) < 0.01
    assert statistics.p_over_seeds(differences, **DRAWN) == 0.5


# ── Holm, wins and losses ─────────────────────────────────────────────────────────────────────────────────────────────


def test_holm_when_worked_by_hand_then_is_the_same() -> None:
    # Ordered: 0.005 × 4, 0.01 × 3, 0.03 × 2, 0.04 × 1 → 0.02, 0.03, 0.06, and 0.04 raised to 0.06.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_when_products_pass_one_then_is_cut_there() -> None:
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_outcomes_when_differences_are_rounding_then_count_as_ties() -> None:
    differences = np.array([[1.0, -2.0, 0.0], [1e-12, -1e-12, 50.0]])
    assert statistics.outcomes(differences) == (2, 3, 1)
