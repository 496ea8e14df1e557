"""What schedulers share: the epochs of every stage and the ramps over the stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from pocl_cli.curriculum.ramp import RatioRamp, TemperatureRamp
from pocl_cli.records import Stage, Subset


def _at_least_one(epochs: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if min(epochs if isinstance(epochs, tuple) else (epochs,), default=1) < 1:
        raise ValueError(f"every stage needs at least 1 epoch, and epochs_per_stage is {_shown(epochs)}")
    return epochs


def _shown(epochs: int | tuple[int, ...]) -> str:
    return str(list(epochs) if isinstance(epochs, tuple) else epochs)


Epochs = Annotated[int | tuple[int, ...], AfterValidator(_at_least_one)]


@dataclass(frozen=True, kw_only=True)
class StagedScheduler(ABC):
    """Stages with their epochs, temperature and kd_ratio; a member says which rows each of them trains on.

    Raises ValueError (a validation error in a configuration) where a list of epochs is not one number a stage.
    """

    needs_partition: ClassVar[bool] = True

    stages: Annotated[int, Field(ge=1)]
    epochs_per_stage: Epochs
    temperature: TemperatureRamp
    kd_ratio: RatioRamp

    def __post_init__(self) -> None:
        if isinstance(self.epochs_per_stage, tuple) and len(self.epochs_per_stage) != self.stages:
            raise ValueError(
                f"epochs_per_stage {_shown(self.epochs_per_stage)} has {len(self.epochs_per_stage)} numbers for"
                f" {self.stages} stages; give one number for all stages, or a list with one a stage"
            )

    @abstractmethod
    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        """The stages of a run over `subsets`, which come easiest first."""

    def _staged(self, rows_per_stage: Sequence[tuple[str, ...]]) -> list[Stage]:
        """One Stage for the record ids of each."""
        epochs = self.epochs_per_stage
        columns = zip(
            rows_per_stage,
            epochs if isinstance(epochs, tuple) else (epochs,) * self.stages,
            self.temperature.values(self.stages),
            self.kd_ratio.values(self.stages),
            strict=True,
        )
        return [Stage(index, *stage) for index, stage in enumerate(columns)]


def joined(subsets: Sequence[Subset]) -> tuple[str, ...]:
    """The record ids of all `subsets`, in their order."""
    return tuple(record_id for subset in subsets for record_id in subset.record_ids)
