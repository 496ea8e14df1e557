"""Experiment trackers: where the lines of a run's `metrics.jsonl` go besides. Open family `tracker`.

A tracker is a registered frozen dataclass that keeps the protocol `Tracker`. Its package is an extra and is imported
when a run opens, never when the configuration is read.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pocl_cli.errors import ConfigError


class TrackerRun(ABC):
    """One run as a tracker sees it; a context manager that closes it."""

    @abstractmethod
    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Records the numbers among `values` at optimizer step `step`, under the names of `metrics.jsonl`."""

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Writes what is left and ends the run. A second call does nothing."""

    def __enter__(self) -> TrackerRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


class Tracker(Protocol):
    """What the training step asks of a member of the family."""

    def check(self) -> None:
        """Raises ConfigError where the tracker's package is missing. Quick: imports nothing heavy."""

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        """Begins the run, or goes on with it where `run_folder` (its name identifies the run) was opened before.

        Args:
            run_folder: where local files of the tracker go. Not a folder that is committed as an artifact: trackers
                write until the program ends.
            run_name: what the tracker's pages call the run.
            config: the resolved configuration, plain nested values; secrets in it are hidden.

        Raises:
            ConfigError: the tracker refuses its settings or has no credentials.
            ResourceError: the tracker's server cannot be reached.
        """


def require_package(module: str, extra: str) -> None:
    """Raises ConfigError where `module` is not installed, with the command that installs it."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"tracker={extra} needs a package that is not installed",
            why=f"no module {module!r}",
            fix=f"pip install 'pocl-cli[{extra}]', or choose tracker=jsonl",
        )


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`, without `step`, which trackers keep as the axis."""
    return {
        name: value
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
