"""A quantity that moves in equal steps from the first stage to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """`start` in the first stage, `end` in the last, linear in the stage's index between them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start: float
    end: float

    def values(self, num_stages: int) -> list[float]:
        """The value of every stage. One stage has `end`, and the last stage has it exactly."""
        assert num_stages >= 1, f"a ramp over {num_stages} stages"
        step = (self.end - self.start) / max(num_stages - 1, 1)
        return [self.start + index * step for index in range(num_stages - 1)] + [self.end]


@dataclass(frozen=True, kw_only=True)
class TemperatureRamp(Ramp):
    """Distillation temperature, above 0."""

    start: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    end: Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class RatioRamp(Ramp):
    """Weight of the distillation term, in 0..1."""

    start: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    end: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
