"""What the processes of a part of a step are told, and where they meet: enough to do it without Hydra."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_cli import log
from pocl_cli.artifacts import durable
from pocl_cli.redaction import scrub_command
from pocl_cli.run import Run
from pocl_cli.schema import PoclConfig
from pocl_cli.validation import from_plain_values, plain_values

# In the work folder: the meeting of the workers that are at work now, and the lock that each of them holds.
FOLDER, LOCK = "workers", "workers.lock"


@dataclass(frozen=True)
class Job:
    """A part of a step, for a process that has not composed anything.

    Attributes:
        part: its name, see `steps.parts`.
        run: the step, without recipes: its configuration names artifacts.
        work: the folder in which the artifact is made.
        console_level: from which level on the first process logs to stderr.
        run_log: the file to which all of them log.
    """

    part: str
    run: Run
    work: Path
    console_level: int
    run_log: Path | None

    @classmethod
    def of(cls, part: str, run: Run, config: PoclConfig, work: Path) -> Job:
        """The job of a command whose models exist under the names that `config` gives them."""
        level, path = log.places()
        safe = Run(run.step, config, _scrubbed(run.overrides), run.resolved, _scrubbed(run.options))
        return cls(part, safe, work.resolve(), level, path.resolve() if path else None)

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "step": self.run.step,
            "config": plain_values(self.run.config),
            "overrides": self.run.overrides,
            "options": self.run.options,
            "resolved": dict(self.run.resolved),
            "working_folder": os.getcwd(),
            "work": str(self.work),
            "console_level": self.console_level,
            "run_log": str(self.run_log) if self.run_log else None,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Job:
        """The job, in its working folder, where relative paths mean the same."""
        os.chdir(values["working_folder"])
        config = from_plain_values(values["config"])
        run = Run(values["step"], config, tuple(values["overrides"]), values["resolved"], tuple(values["options"]))
        run_log = Path(values["run_log"]) if values["run_log"] else None
        return cls(values["part"], run, Path(values["work"]), values["console_level"], run_log)


def _scrubbed(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(scrub_command(words))


@dataclass(frozen=True)
class Meeting:
    """The private folder through which controller, agent and workers know of each other."""

    folder: Path

    def write_job(self, job: Job) -> None:
        durable.write_json(self.folder / "job.json", job.to_json())

    def read_job(self) -> Job:
        return Job.from_json(json.loads((self.folder / "job.json").read_bytes()))

    # ── how each worker ended ─────────────────────────────────────────────────────────────────────────────────────

    def write_status(self, rank: int, status: Mapping[str, Any]) -> None:
        durable.write_json(self.folder / f"status-{rank}.json", status)

    def status(self, rank: int) -> dict[str, Any]:
        """What the worker left; an empty mapping where it has not ended, or died before it could."""
        return self._read(f"status-{rank}.json")

    # ── that each worker lives ────────────────────────────────────────────────────────────────────────────────────

    def sign(self, rank: int) -> Path:
        """Notes the worker's process; the file is touched while it lives."""
        path = self.folder / f"process-{rank}.json"
        durable.write_json(path, {"pid": os.getpid()})
        return path

    def process(self, rank: int) -> int | None:
        """The worker's process; None before it has begun."""
        pid: int | None = self._read(f"process-{rank}.json").get("pid")
        return pid

    def last_beat(self, rank: int) -> int:
        """When the worker's file was touched; 0 before it has begun."""
        path = self.folder / f"process-{rank}.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    # ── how the agent saw them end ────────────────────────────────────────────────────────────────────────────────

    def write_ends(self, exit_codes: Mapping[int, int]) -> None:
        durable.write_json(self.folder / "ends.json", {str(rank): code for rank, code in exit_codes.items()})

    def ends(self) -> dict[int, int]:
        """The exit codes of workers that failed, negative where a signal ended one; empty where the agent told none."""
        return {int(rank): code for rank, code in self._read("ends.json").items()}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
