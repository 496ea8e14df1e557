"""A quantity that has a value for every stage: a ramp from the first to the last, or a list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """From `start` in the first stage to `end` in the last; or `values`, one a stage, which then decide alone.

    With s = i/(n−1) for stage i of n, `linear` is start + s·(end − start), `cosine` the same with (1 − cos πs)/2 for s,
    and `step` is `start` in the first ⌊n/2⌋ stages and `end` in the others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start: float
    end: float
    shape: Literal["linear", "step", "cosine"] = "linear"
    values: tuple[float, ...] | None = None

    def over(self, num_stages: int) -> list[float]:
        """The value of every stage. On a ramp, one stage has `end`, and the last stage has it exactly."""
        assert num_stages >= 1, f"a ramp over {num_stages} stages"
        if self.values is not None:
            assert len(self.values) == num_stages, f"{len(self.values)} values for {num_stages} stages"
            return list(self.values)
        return [self._before_the_last(index, num_stages) for index in range(num_stages - 1)] + [self.end]

    def _before_the_last(self, index: int, num_stages: int) -> float:
        if self.shape == "step":
            return self.start if index < num_stages // 2 else self.end
        if self.shape == "cosine":
            return self.start + (1 - math.cos(math.pi * index / (num_stages - 1))) / 2 * (self.end - self.start)
        return self.start + index * ((self.end - self.start) / (num_stages - 1))


Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class TemperatureRamp(Ramp):
    """Distillation temperature, above 0."""

    start: Temperature
    end: Temperature
    values: tuple[Temperature, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RatioRamp(Ramp):
    """Weight of the distillation term, in 0..1."""

    start: Ratio
    end: Ratio
    values: tuple[Ratio, ...] | None = None
