"""KD methods that change in the course of a run.

A method is a frozen dataclass; what changes is kept beside it, as a mapping of small tensors which is saved with every
checkpoint. Training asks for the method of each step and tells what came of the step. It sees no method's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.divergence import KDMethod

MethodState: TypeAlias = "Mapping[str, Tensor]"


@runtime_checkable
class Evolving(Protocol):
    """What a KD method has beside its divergence where that depends on the progress of the run or on its past steps.

    Both functions are pure, so that a run which resumes from a saved state gives the same bytes.
    """

    def for_step(self, progress: float, state: MethodState) -> KDMethod:
        """The method that a step uses.

        Args:
            progress: share of the run's optimizer steps that are done, from 0; over all stages together.
            state: what `after_step` gave after the step before; empty before the first.
        """
        ...

    def after_step(self, progress: float, state: MethodState, kd: Tensor) -> MethodState:
        """The state after a step.

        Args:
            progress: share of the optimizer steps that are done, this one among them.
            state: that of the step.
            kd: mean divergence of the global batch's response tokens in the step, in nats, over all processes; a
                scalar on the device. To read its value here would make every step wait for the device.
        """
        ...


@runtime_checkable
class HeedsDev(Protocol):
    """What a KD method has besides where its state depends on the dev evaluations."""

    def after_dev(self, figures: Mapping[str, float], state: MethodState) -> MethodState:
        """The state after a dev evaluation, of which the first comes before the first step. Pure, too.

        Args:
            figures: `dev_cross_entropy` and what else was measured, over all processes.
            state: that of the method.
        """
        ...


@runtime_checkable
class ShowsState(Protocol):
    """What a KD method has besides where a person wants to follow its state."""

    def shown(self, state: MethodState) -> dict[str, float]:
        """Numbers for the lines of a run, by name."""
        ...


def for_step(method: KDMethod, progress: float, state: MethodState) -> KDMethod:
    """The method that a step uses: `method` itself where it does not change."""
    return method.for_step(progress, state) if isinstance(method, Evolving) else method


def after_step(method: KDMethod, progress: float, state: MethodState, kd: Tensor) -> MethodState:
    """The state after a step, as it was where the method does not change."""
    return method.after_step(progress, state, kd) if isinstance(method, Evolving) else state


def after_dev(method: KDMethod, figures: Mapping[str, float], state: MethodState) -> MethodState:
    """The state after a dev evaluation, as it was where the method does not heed them."""
    return method.after_dev(figures, state) if isinstance(method, HeedsDev) else state


def shown(method: KDMethod, state: MethodState) -> dict[str, float]:
    """What the method wants shown of its state."""
    return method.shown(state) if isinstance(method, ShowsState) else {}
