"""Open families: one module with a decorated class plus one YAML file adds one member.

A family finds its members by importing every module of its package, then the entry points of the group
`pocl.plugins`. Members are frozen dataclasses whose fields are the keys of their YAML file (beside `name`), with
ranges as `Annotated[float, Field(ge=0)]`; configuration validates against them, so they must import without torch
(annotate with `if TYPE_CHECKING: from torch import Tensor` and use tensor methods).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter

from pocl_cli.errors import ConfigError, nearest

T = TypeVar("T", bound=type)


class Registry:
    """The members of one open family, by name."""

    def __init__(self, family: str, package: str) -> None:
        self.family, self.package = family, package
        self._members: dict[str, type] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: adds a frozen dataclass to the family under `name`."""

        def add(member: T) -> T:
            assert dataclasses.is_dataclass(member), f"{member.__name__} must be a dataclass"
            known = self._members.get(name)
            twice = known is not None and known.__qualname__ != member.__qualname__
            assert not twice, f"{self.family} {name!r} is registered twice"
            member.name = name  # type: ignore[attr-defined]
            member.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
            self._members[name] = member
            return member

        return add

    def names(self) -> list[str]:
        """The names of all members, sorted."""
        self._discover()
        return sorted(self._members)

    def get(self, name: str) -> type:
        """The class registered under `name`. Raises ConfigError with the nearest name."""
        self._discover()
        if name not in self._members:
            guess = nearest(name, self._members)
            raise ConfigError(
                f"unknown {self.family} {name!r}",
                why=f"known are {', '.join(self.names())}",
                fix=f"did you mean {guess!r}?" if guess else f"choose one of them with {self.family}=NAME",
            )
        return self._members[name]

    def build(self, values: Any) -> Any:
        """The member that `values` (a mapping with `name` and the member's own fields) describes.

        Raises:
            ConfigError: there is no name, or it is unknown.
            pydantic.ValidationError: a field is missing, unknown, of another type, or out of range.
        """
        own = dict(values) if isinstance(values, Mapping) else {}
        name = own.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(
                f"no {self.family} is chosen",
                why=f"its name is {'missing' if name is None else repr(name)}",
                fix=f"choose one with {self.family}=NAME: {', '.join(self.names())}",
            )
        return TypeAdapter(self.get(name)).validate_python(own)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in importlib.metadata.entry_points(group="pocl.plugins"):
            entry.load()


def describe(member: Any) -> dict[str, Any]:
    """The member's name and fields as plain values: what enters an artifact's identity."""
    return {"name": member.name, **{f.name: _plain(getattr(member, f.name)) for f in dataclasses.fields(member)}}


def _plain(value: Any) -> Any:
    """A field as plain values; a member within a member keeps its name, without which two could not be told apart."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return describe(value) if hasattr(value, "name") else dataclasses.asdict(value)


kd_methods = Registry("kd_method", "pocl_cli.losses")
schedulers = Registry("curriculum", "pocl_cli.curriculum")
difficulty_measurers = Registry("difficulty", "pocl_cli.difficulty")
generators = Registry("dataset.generator", "pocl_cli.data.generators")
trackers = Registry("tracker", "pocl_cli.trackers")
