"""A KD method that is built on another one: the field of its configuration that holds the other."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, ValidationError

from pocl_cli.registry import kd_methods


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
