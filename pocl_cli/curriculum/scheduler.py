"""What schedulers share: the epochs of every stage and the ramps over the stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from pocl_cli.curriculum.exposure import balanced
from pocl_cli.curriculum.ramp import RatioRamp, TemperatureRamp
from pocl_cli.records import Convergence, Stage, Subset


def _at_least_one(epochs: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if min(epochs if isinstance(epochs, tuple) else (epochs,), default=1) < 1:
        raise ValueError(f"every stage needs at least 1 epoch, and epochs_per_stage is {_shown(epochs)}")
    return epochs


def _shown(epochs: int | tuple[int, ...]) -> str:
    return str(list(epochs) if isinstance(epochs, tuple) else epochs)


NEVER = Convergence(metric=None, patience=1, min_epochs=1)
Epochs = Annotated[int | tuple[int, ...], AfterValidator(_at_least_one)]


@dataclass(frozen=True, kw_only=True)
class StagedScheduler(ABC):
    """Stages with their epochs, temperature and kd_ratio; a member says which rows each of them trains on.

    Raises ValueError (a validation error in a configuration) where a list is not one number a stage.

    Attributes:
        stages: how many there are, and how many subsets the partition has.
        epochs_per_stage: passes over a stage's rows.
        temperature: of the distillation.
        kd_ratio: weight of the distillation term.
        exposure: `epochs`, where a stage sees each of its rows once an epoch; or `balanced` (`exposure.py`).
        restart_optimizer: a stage starts with fresh moments; else with those of the last step before it.
        restart_lr: a stage starts the learning-rate schedule afresh; else one runs through all stages.
        convergence: a rule by which a stage may end before its last epoch.
    """

    needs_partition: ClassVar[bool] = True

    stages: Annotated[int, Field(ge=1)]
    epochs_per_stage: Epochs
    temperature: TemperatureRamp
    kd_ratio: RatioRamp
    exposure: Literal["epochs", "balanced"] = "epochs"
    restart_optimizer: bool = True
    restart_lr: bool = True
    convergence: Convergence = NEVER

    def __post_init__(self) -> None:
        if isinstance(self.epochs_per_stage, tuple) and len(self.epochs_per_stage) != self.stages:
            raise ValueError(
                f"epochs_per_stage {_shown(self.epochs_per_stage)} has {len(self.epochs_per_stage)} numbers for"
                f" {self.stages} stages; give one number for all stages, or a list with one a stage"
            )
        given = self.epochs_per_stage
        if self.convergence.metric is not None and self.convergence.min_epochs > min(
            given if isinstance(given, tuple) else (given,)
        ):
            raise ValueError(
                f"convergence.min_epochs {self.convergence.min_epochs} is more than epochs_per_stage {_shown(given)},"
                " which is the most that a stage makes"
            )
        for name, ramp in (("temperature", self.temperature), ("kd_ratio", self.kd_ratio)):
            if ramp.values is not None and len(ramp.values) != self.stages:
                raise ValueError(
                    f"{name} {list(ramp.values)} has {len(ramp.values)} numbers for {self.stages} stages; give one a"
                    f" stage, or set {name}.values=null for a ramp from start to end"
                )

    @abstractmethod
    def __call__(self, subsets: Sequence[Subset]) -> list[Stage]:
        """The stages of a run over `subsets`, which come easiest first."""

    def _staged(self, rows_per_stage: Sequence[tuple[str, ...]]) -> list[Stage]:
        """One Stage for the record ids of each."""
        epochs = given if isinstance(given := self.epochs_per_stage, tuple) else (given,) * self.stages
        temperatures, ratios = self.temperature.over(self.stages), self.kd_ratio.over(self.stages)
        times = balanced(rows_per_stage, epochs) if self.exposure == "balanced" else [None] * self.stages
        return [
            Stage(
                index,
                rows_per_stage[index],
                epochs[index],
                temperatures[index],
                ratios[index],
                times=times[index],
                restart_optimizer=self.restart_optimizer,
                restart_lr=self.restart_lr,
                convergence=self.convergence if self.convergence.metric else None,
            )
            for index in range(self.stages)
        ]


def joined(subsets: Sequence[Subset]) -> tuple[str, ...]:
    """The record ids of all `subsets`, in their order."""
    return tuple(record_id for subset in subsets for record_id in subset.record_ids)
