"""The learning rate as a pure function of the step, and which stages share a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pocl_cli.records import Stage


@dataclass(frozen=True)
class LearningRate:
    """A stage's part of a half cosine: its own one, or `num_steps` that several stages share.

    Attributes:
        start: at the first step of the schedule.
        end: towards which it falls.
        num_steps: length of the schedule in optimizer steps.
        before: steps of the schedule that belong to earlier stages.
    """

    start: float
    end: float
    num_steps: int
    before: int = 0

    def at(self, stage_step: int) -> float:
        """The learning rate of the stage's optimizer step `stage_step`, counted from 0."""
        return cosine(self.before + stage_step, self.num_steps, start=self.start, end=self.end)


def learning_rates(
    stages: Sequence[Stage], num_steps: Sequence[int], *, start: float, end: float
) -> list[LearningRate]:
    """The schedule of every stage: a new one where the stage restarts it, else the one of the stage before.

    Args:
        stages: of the run.
        num_steps: the whole length of every stage.
        start: learning rate at the start of a schedule.
        end: learning rate at its end.
    """
    firsts = [index for index, stage in enumerate(stages) if index == 0 or stage.restart_lr]
    rates = []
    for index in range(len(stages)):
        first = max(one for one in firsts if one <= index)
        last = min((one for one in firsts if one > index), default=len(stages))
        rates.append(LearningRate(start, end, sum(num_steps[first:last]), sum(num_steps[first:index])))
    return rates


def cosine(step: int, num_steps: int, *, start: float, end: float) -> float:
    """The learning rate of optimizer step `step` (from 0) of `num_steps`: a half cosine from `start` towards `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2
