"""KD methods that are built on another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BeforeValidator, ValidationError

from pocl_cli.losses import evolving
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pocl_cli.losses.evolving import MethodState


def _build_base(values: Any) -> Any:
    try:
        base = kd_methods.build(values)
    except ValidationError as error:
        raise ValueError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from error
    if not base.needs_teacher:
        raise ValueError(f"{base.name} has no divergence; choose a method with a teacher")
    if hasattr(base, "rows_for_step"):
        raise ValueError(f"{base.name} chooses the rows of a step, which only the outermost method can do")
    return base


BaseMethod: TypeAlias = Annotated[Any, BeforeValidator(_build_base)]


@dataclass(frozen=True, kw_only=True)
class AroundBase:
    """The key `base`, the other method; the state is the base's own, and so is T²."""

    base: BaseMethod

    @property
    def t_squared(self) -> bool:
        return bool(self.base.t_squared)

    def after_step(self, progress: float, state: MethodState, kd: Tensor) -> MethodState:
        return evolving.after_step(self.base, progress, state, kd)

    def after_dev(self, figures: Mapping[str, float], state: MethodState) -> MethodState:
        return evolving.after_dev(self.base, figures, state)
