"""Whether the arms spend the same: optimizer steps, tokens, and the shape of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocl_cli.curriculum.stage_table import StageRow
    from pocl_cli.records import Stage
    from pocl_cli.schema import TrainConfig

# A difference of tokens by less than this share of the baseline's is named as a number only.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Spent:
    """What one run spends.

    Attributes:
        steps: optimizer steps of every stage that makes any.
        schedules: steps of every schedule of the learning rate: stages that do not restart it share one.
        num_optimizers: how often the optimizer starts with fresh moments.
        lr: learning rate at the start of every schedule, and at its end.
        global_batch_size: rows an optimizer step.
        response_tokens: trained on, over all steps; None where it is not known yet.
    """

    steps: tuple[int, ...]
    schedules: tuple[int, ...]
    num_optimizers: int
    lr: tuple[float, float]
    global_batch_size: int
    response_tokens: int | None = None

    @property
    def num_steps(self) -> int:
        return sum(self.steps)


def spent_by(train: TrainConfig, stages: Sequence[Stage], table: Sequence[StageRow]) -> Spent:
    """What a run spends by its stages and their table; the tokens are known when it has run."""
    made = [(stage, row["steps"]) for stage, row in zip(stages, table, strict=True) if row["steps"]]
    schedules: list[int] = []
    for index, (stage, steps) in enumerate(made):
        if index == 0 or stage.restart_lr:
            schedules.append(steps)
        else:
            schedules[-1] += steps
    return Spent(
        steps=tuple(steps for _, steps in made),
        schedules=tuple(schedules),
        num_optimizers=1 + sum(stage.restart_optimizer for stage, _ in made[1:]),
        lr=(train.lr, train.lr_end),
        global_batch_size=train.global_batch_size,
    )


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
            found.append(f"{_percent(ours, theirs)} response tokens")
    if arm.lr != baseline.lr:
        found.append(f"learning rate {_rates(arm)} instead of {_rates(baseline)}")
    if len(arm.schedules) != len(baseline.schedules):
        found.append(f"{len(arm.schedules)} learning-rate cosines instead of {len(baseline.schedules)}")
    elif arm.num_steps == baseline.num_steps and arm.schedules != baseline.schedules:
        found.append(f"cosines of {_listed(arm.schedules)} steps instead of {_listed(baseline.schedules)}")
    if arm.num_optimizers != baseline.num_optimizers:
        found.append(f"{arm.num_optimizers} optimizer starts instead of {baseline.num_optimizers}")
    return found


def mean_spent(runs: Sequence[Spent]) -> Spent:
    """What the runs of an arm spend, which differ in their tokens by the training seed: the mean of those."""
    assert len({replace(run, response_tokens=None) for run in runs}) == 1, "an arm is one recipe"
    tokens = [run.response_tokens for run in runs if run.response_tokens is not None]
    return replace(runs[0], response_tokens=round(sum(tokens) / len(tokens)) if tokens else None)


def _rates(spent: Spent) -> str:
    return " → ".join(f"{rate:g}" for rate in spent.lr)


def _listed(numbers: Sequence[int]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)


def _percent(value: int, reference: int) -> str:
    return f"{100 * (value - reference) / reference:+.1f} %".replace("-", "−")
