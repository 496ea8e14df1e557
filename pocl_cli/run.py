"""What one step is asked to do: its checked configuration, and what a person typed for it. Free of Hydra."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pocl_cli.redaction import scrub_command
from pocl_cli.schema import PoclConfig


@dataclass(frozen=True)
class Run:
    """One step's checked configuration, what a person typed for it, and the plain values that the manifest keeps.

    Attributes:
        step: the command.
        config: the checked configuration.
        overrides: as typed.
        resolved: the composed values, interpolations resolved, secrets hidden.
        options: what the command needs before its overrides (`--config-dir=…`).
        recipes: the runs that make the teacher or the student, by experiment and overrides.
        waits: wait for a process that makes the same artifact instead of failing.
    """

    step: str
    config: PoclConfig
    overrides: tuple[str, ...]
    resolved: Mapping[str, Any]
    options: tuple[str, ...] = ()
    recipes: Mapping[tuple[str, tuple[str, ...]], Run] = field(default_factory=dict, repr=False)
    waits: bool = False

    @property
    def command(self) -> list[str]:
        """The arguments that an artifact remembers, secrets hidden."""
        return scrub_command(["pocl", self.step, *self.options, *self.overrides])

    def command_for(self, step: str, *more: str) -> str:
        """The shell command of another step of the same chain."""
        overrides = [word for word in self.overrides if not word.startswith("plan.")]
        return shlex.join(["pocl", step, *self.options, *overrides, *more])

    def for_step(self, step: str) -> Run:
        """The same chain, addressed by another step."""
        return replace(self, step=step)

    def recipe(self, experiment: str, overrides: Sequence[str]) -> Run:
        """The run of `experiment=NAME` that makes this one's teacher or student."""
        return replace(self.recipes[experiment, tuple(overrides)], waits=self.waits)
