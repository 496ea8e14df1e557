"""Whether the arms spend the same: optimizer steps, tokens, and the shape of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A difference of tokens by less than this share of the baseline's is named as a number only.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Spent:
    """What one run spends.

    Attributes:
        steps: optimizer steps of every stage that makes any.
        lr: learning rate at the start of every stage, and at its end.
        global_batch_size: rows an optimizer step.
        response_tokens: trained on, over all steps; None where it is not known yet.
    """

    steps: tuple[int, ...]
    lr: tuple[float, float]
    global_batch_size: int
    response_tokens: int | None = None

    @property
    def num_steps(self) -> int:
        return sum(self.steps)


def mismatches(arm: Spent, baseline: Spent) -> list[str]:
    """Where an arm does not match the baseline, in words; nothing where it does."""
    found = []
    if arm.num_steps != baseline.num_steps:
        found.append(
            f"{arm.num_steps:,} steps instead of {baseline.num_steps:,} ({_percent(arm.num_steps, baseline.num_steps)})"
        )
    if arm.global_batch_size != baseline.global_batch_size:
        found.append(f"{arm.global_batch_size:,} rows a step instead of {baseline.global_batch_size:,}")
    if arm.response_tokens is not None and baseline.response_tokens is not None:
        ours, theirs = arm.response_tokens, baseline.response_tokens
        if abs(ours - theirs) > TOLERANCE * theirs:
            found.append(f"{ours:,} response tokens instead of {theirs:,} ({_percent(ours, theirs)})")
    if arm.lr != baseline.lr:
        found.append(f"learning rate {_rates(arm)} instead of {_rates(baseline)}")
    if len(arm.steps) != len(baseline.steps):
        found.append(f"{_times(arm)} instead of {_times(baseline)}")
    elif arm.num_steps == baseline.num_steps and arm.steps != baseline.steps:
        found.append(f"stages of {_listed(arm.steps)} steps instead of {_listed(baseline.steps)}")
    return found


def mean_spent(runs: Sequence[Spent]) -> Spent:
    """What the runs of an arm spend, which differ in their tokens by the training seed: the mean of those."""
    first = runs[0]
    assert all((run.steps, run.lr) == (first.steps, first.lr) for run in runs), "an arm is one recipe"
    tokens = [run.response_tokens for run in runs if run.response_tokens is not None]
    mean = round(sum(tokens) / len(tokens)) if tokens else None
    return Spent(first.steps, first.lr, first.global_batch_size, mean)


def shape(spent: Spent) -> str:
    """The learning rate of a run in a few words."""
    return f"{_rates(spent)}, {_times(spent)}"


def _rates(spent: Spent) -> str:
    return " → ".join(f"{rate:g}" for rate in spent.lr)


def _times(spent: Spent) -> str:
    count = len(spent.steps)
    return "one cosine" if count == 1 else f"{count} cosines"


def _listed(numbers: Sequence[int]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)


def _percent(value: int, reference: int) -> str:
    return f"{100 * (value - reference) / reference:+.1f} %"
