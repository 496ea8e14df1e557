"""`metrics.jsonl` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_cli.registry import trackers
from pocl_cli.trackers import TrackerRun


@trackers.register("jsonl")
@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Tracks nothing of its own.

    The training loop always writes `metrics.jsonl`, since resuming and evaluation read it; a second writer of the same
    lines could only disagree with it.
    """

    def check(self) -> None:
        """Needs no package."""

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        return _NothingMore()


class _NothingMore(TrackerRun):
    def log(self, values: Mapping[str, Any], step: int) -> None:
        """The loop has written the line already."""

    def close(self, failed: bool = False) -> None:
        """Nothing is open."""
