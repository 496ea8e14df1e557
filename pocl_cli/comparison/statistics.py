"""How far two arms differ, and how sure that is, given the differences of their answers.

Shape suffixes: S training seeds, P prompts, B resamples. The differences of an arm to the baseline are `[S, P]`: both
answer the same prompts, and runs of one training seed are paired (same order of rows, same dropout). Seeds and
prompts are crossed, and a claim about the method has to hold for other ones of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

if TYPE_CHECKING:
    from typing import TypeAlias

Floats: TypeAlias = "npt.NDArray[np.float64]"

# Averages over decoding seeds are sums in another order: differences below this are rounding.
TIE = 1e-9
# Numbers that one batch of resamples may hold.
_BATCH_NUMBERS = 4_000_000


class Interval(NamedTuple):
    """Bounds of a mean difference."""

    low: float
    high: float


class Outcomes(NamedTuple):
    """In how many of the pairs (training seed, prompt) the arm scores higher, the same, and lower."""

    wins: int
    ties: int
    losses: int


def outcomes(differences_SP: Floats) -> Outcomes:
    """Counts the pairs by the sign of their difference."""
    wins, losses = int((differences_SP > TIE).sum()), int((differences_SP < -TIE).sum())
    return Outcomes(wins, differences_SP.size - wins - losses, losses)


def bootstrap_interval(differences_SP: Floats, *, confidence: float, num_resamples: int, seed: int) -> Interval | None:
    """A percentile interval of the mean difference, for other training seeds and other prompts.

    Seeds and prompts are drawn with replacement, each by itself, since they are crossed (the pigeonhole bootstrap of
    Owen 2007, arXiv 0711.1630). So few seeds as a comparison has give too narrow an interval, so their deviations from
    the mean are widened first by √(S/(S−1)) · t/z, with the quantiles of Student's t of S − 1 degrees of freedom and of
    the normal distribution: the idea of Hesterberg's expanded percentile interval (2015, arXiv 1411.5279), applied to
    the seeds alone. With one seed the interval is about prompts only, with one prompt about seeds only.

    Returns:
        None for a single difference, which says nothing of its own spread.
    """
    num_seeds, num_prompts = differences_SP.shape
    if differences_SP.size == 1:
        return None
    drawn = [np.arange(size) for size in (num_seeds, num_prompts) if size > 1]
    widened_SP = widened(differences_SP, confidence)

    def mean(*indices: npt.NDArray[np.intp], axis: int = -1) -> Floats:
        given = iter(indices)
        seeds = next(given) if num_seeds > 1 else np.zeros_like(indices[0][..., :1])
        prompts = next(given) if num_prompts > 1 else np.zeros_like(indices[0][..., :1])
        return _mean_of_drawn(widened_SP, seeds, prompts)

    found = stats.bootstrap(
        drawn,
        mean,
        n_resamples=num_resamples,
        batch=max(1, _BATCH_NUMBERS // num_prompts),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(float(found.confidence_interval.low), float(found.confidence_interval.high))


def widened(differences_SP: Floats, confidence: float) -> Floats:
    """The differences with the seeds' deviations from the overall mean made larger; see `bootstrap_interval`."""
    num_seeds = len(differences_SP)
    if num_seeds == 1:
        return differences_SP
    quantile = (1 + confidence) / 2
    factor = math.sqrt(num_seeds / (num_seeds - 1)) * stats.t.ppf(quantile, num_seeds - 1) / stats.norm.ppf(quantile)
    deviations_S1 = differences_SP.mean(axis=1, keepdims=True) - differences_SP.mean()
    widened_SP: Floats = differences_SP + (factor - 1) * deviations_S1
    return widened_SP


def _mean_of_drawn(values_SP: Floats, seeds: npt.NDArray[np.intp], prompts: npt.NDArray[np.intp]) -> Floats:
    """The mean over the drawn seeds `[B, S]` and prompts `[B, P]` of each resample; without B for a single draw."""
    num_prompts = values_SP.shape[1]
    rows = np.atleast_2d(prompts)
    # How often each prompt was drawn: a matrix product instead of B × S × P numbers.
    offsets = num_prompts * np.arange(len(rows))[:, np.newaxis]
    counts_BP = np.bincount((rows + offsets).ravel(), minlength=num_prompts * len(rows)).reshape(len(rows), -1)
    means_BS = counts_BP @ values_SP.T / rows.shape[1]
    drawn_B: Floats = np.take_along_axis(means_BS, np.atleast_2d(seeds), axis=1).mean(axis=1)
    return drawn_B if prompts.ndim > 1 else drawn_B[0]


def p_over_prompts(differences_SP: Floats, *, num_resamples: int, seed: int) -> float:
    """Two-sided sign-flip p-value of the mean over seeds, flipped prompt by prompt.

    The question: do these trained models differ, beyond the choice of the prompts? It says nothing of other training
    seeds.
    """
    return _sign_flip(differences_SP.mean(axis=0), num_resamples, seed)


def p_over_seeds(differences_SP: Floats, *, num_resamples: int, seed: int) -> float:
    """Two-sided sign-flip p-value of the mean over prompts, flipped training seed by training seed.

    The question: do the arms differ on these prompts, beyond the choice of the training seeds? It is at least
    2 / 2^S (`least_p_over_seeds`).
    """
    return _sign_flip(differences_SP.mean(axis=1), num_resamples, seed)


def least_p_over_seeds(num_seeds: int) -> float:
    """The smallest p-value that flipping the signs of so many seeds can give."""
    return float(0.5 ** (num_seeds - 1))


def _sign_flip(values: Floats, num_resamples: int, seed: int) -> float:
    """Exact where 2^n permutations are no more than `num_resamples`, else from so many random ones."""
    moving = values[np.abs(values) > TIE]  # a flip of the others changes nothing
    if len(moving) < 2:  # and a single one is as large with the other sign
        return 1.0
    found = stats.permutation_test(
        (moving, np.zeros_like(moving)),  # exchanged within a pair, a difference changes its sign
        lambda arm, baseline, axis=-1: (arm - baseline).sum(axis=axis),
        permutation_type="samples",
        n_resamples=num_resamples,
        batch=max(1, _BATCH_NUMBERS // (2 * len(moving))),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being so many, in their order. Holm 1979, the step-down Bonferroni method."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
