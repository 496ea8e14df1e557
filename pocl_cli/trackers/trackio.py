"""Trackio, of Hugging Face."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pocl_cli.errors import ConfigError, ResourceError
from pocl_cli.redaction import scrub, scrub_values
from pocl_cli.registry import trackers
from pocl_cli.trackers import TrackerRun, numbers, require_package


@trackers.register("trackio")
@dataclass(frozen=True, kw_only=True)
class Trackio:
    """A run of Trackio: in its local database (TRACKIO_DIR), or in the Hugging Face Space `space_id`."""

    project: Annotated[str, Field(min_length=1)]
    space_id: str | None
    private: bool

    def check(self) -> None:
        require_package("trackio", extra="trackio")

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        self.check()
        import trackio

        with _reported():
            run = trackio.init(
                project=self.project,
                # Trackio knows a run by its name alone: the folder's name keeps two seeds of one recipe apart.
                name=f"{run_name}-{run_folder.name}" if run_folder.name not in run_name else run_name,
                space_id=self.space_id,
                private=self.private,
                config=scrub_values(config),
                resume="allow",
                embed=False,
            )
        return _TrackioRun(run)


class _TrackioRun(TrackerRun):
    """Trackio keeps both tellings of a step that a resumed run repeats; their values are the same."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, values: Mapping[str, Any], step: int) -> None:
        with _reported():
            self._run.log(numbers(values), step=step)

    def close(self, failed: bool = False) -> None:
        if self._run is not None:
            self._run = None
            import trackio

            # Not the run's own finish(): Trackio would print a second farewell to stdout when the program ends.
            with _reported():
                trackio.finish()


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    # The hub's HTTP client has other names in other releases; its base class is always found here.
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

    try:
        # Stdout belongs to the path of the artifact, and Trackio prints there.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (LocalTokenNotFoundError, ValueError) as error:
        raise ConfigError(
            "Trackio refuses the run",
            where="tracker=trackio",
            why=scrub(str(error)),
            fix="check tracker.project; for tracker.space_id run `hf auth login` first",
        ) from error
    except HTTPError as error:
        raise ResourceError(
            "the Hugging Face Space cannot be used",
            where="tracker.space_id",
            why=scrub(str(error)),
            fix="check its name and your rights, or set tracker.space_id=null",
        ) from error
