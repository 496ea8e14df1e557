"""Weights & Biases."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pocl_cli.errors import ConfigError, ResourceError
from pocl_cli.redaction import scrub, scrub_values
from pocl_cli.registry import trackers
from pocl_cli.trackers import TrackerRun, numbers, require_package

_TIMEOUT_SECONDS = 20


@trackers.register("wandb")
@dataclass(frozen=True, kw_only=True)
class Wandb:
    """A run of Weights & Biases. `offline` keeps it in `wandb/` of the run's folder for a later `wandb sync`."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None
    mode: Literal["online", "offline"]

    def check(self) -> None:
        require_package("wandb", extra="wandb")

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        self.check()
        import wandb

        from pocl_cli.artifacts import durable

        durable.make_folder(run_folder)

        # The console is pocl's own, and the metadata hold the command line, secrets among the overrides included.
        settings = wandb.Settings(console="off", disable_git=True, x_disable_meta=True, init_timeout=_TIMEOUT_SECONDS)
        with _reported():
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                name=run_name,
                id=run_folder.name,
                resume="allow" if self.mode == "online" else None,
                dir=str(run_folder),
                config=scrub_values(config),
                settings=settings,
            )
        return _WandbRun(run)


class _WandbRun(TrackerRun):
    """W&B ignores steps below the last it has: what a resumed run repeats it has already, with the same values."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, Any], step: int) -> None:
        with _reported():
            self._run.log(numbers(values), step=step)

    def close(self, failed: bool = False) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            with _reported():
                run.finish(exit_code=1 if failed else 0)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    from wandb.errors import AuthenticationError, CommError, UsageError

    try:
        # Stdout belongs to the path of the artifact.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (AuthenticationError, UsageError) as error:
        raise ConfigError(
            "W&B refuses the run",
            where="tracker=wandb",
            why=scrub(str(error)),
            fix="run `wandb login`, or set tracker.mode=offline",
        ) from error
    except CommError as error:
        raise ResourceError(
            "W&B cannot be reached",
            where="tracker=wandb",
            why=scrub(str(error)),
            fix="set tracker.mode=offline and sync later",
        ) from error
