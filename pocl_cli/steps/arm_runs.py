"""The runs of a comparison: each an ordinary `pocl evaluate` that distils first, here or several at a time."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from pocl_cli.comparison.arms import ArmRun
from pocl_cli.errors import PoclError
from pocl_cli.log import duration, get_logger

if TYPE_CHECKING:
    from pocl_cli.schema import PoclConfig

# More processes than these only by comparison.num_jobs: each takes the memory of a run.
_MOST_JOBS = 8
_LOOK_SECONDS = 0.05
# So long a run may take to write its checkpoint when it is stopped.
_GRACE_SECONDS = 60.0


class RunsFailedError(PoclError):
    """Runs of a comparison failed; `errors` holds a line each."""

    def __init__(self, errors: Sequence[PoclError]) -> None:
        super().__init__(f"{len(errors)} errors in the comparison")
        self.errors = list(errors)
        self.exit_code = max(error.exit_code for error in errors)


class _ToldError(PoclError):
    """An error line that a process has printed, with its exit code."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def num_jobs(config: PoclConfig) -> int:
    """How many runs go at a time: `comparison.num_jobs`, or what the cores of a CPU allow for."""
    assert config.comparison is not None, "a configuration of pocl compare"
    hardware = config.hardware
    if config.comparison.num_jobs is not None:
        return config.comparison.num_jobs
    if hardware.device != "cpu" or hardware.num_threads is None:
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(_MOST_JOBS, cores // (hardware.num_threads * hardware.num_processes)))


def make(runs: Sequence[ArmRun], jobs: int) -> None:
    """Trains and evaluates; a run that fails does not stop the others.

    Raises:
        RunsFailedError: when all others are done, with every error.
        Interrupted: SIGTERM came; the runs under way have written checkpoints.
    """
    jobs = min(jobs, len(runs))
    get_logger().info("%d runs are missing; %s", len(runs), f"{jobs} at a time" if jobs > 1 else "one by one")
    errors = _in_processes(runs, jobs) if jobs > 1 else _in_turn(runs)
    if errors:
        raise RunsFailedError(errors)


def _in_turn(runs: Sequence[ArmRun]) -> list[PoclError]:
    from pocl_cli.steps.dispatch import run_step

    errors: list[PoclError] = []
    for number, one in enumerate(runs, start=1):
        started, failed = time.monotonic(), False
        try:
            run_step(one.run.for_step("evaluate"))
        except PoclError as error:
            failed = True
            errors.append(type(error)(f"{one.cell}: {error.what}", where=error.where, why=error.why, fix=error.fix))
        _tell(number, len(runs), one, started, failed=failed)
    return errors


# ── several at a time ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Running:
    """A run in a process of its own, which says in `stderr` what goes on."""

    one: ArmRun
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    started: float


def _in_processes(runs: Sequence[ArmRun], jobs: int) -> list[PoclError]:
    waiting, running = list(runs), list[_Running]()
    errors: list[PoclError] = []
    num_done = 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_started(waiting.pop(0)))
            time.sleep(_LOOK_SECONDS)
            for ended in [one for one in running if one.process.poll() is not None]:
                running.remove(ended)
                num_done += 1
                wrong = _errors(ended)
                errors += wrong
                _tell(num_done, len(runs), ended.one, ended.started, failed=bool(wrong))
    finally:
        _stop([one.process for one in running])
    return errors


def _started(one: ArmRun) -> _Running:
    """`pocl evaluate` with the modules of this process.

    A session of its own keeps Ctrl-C from it, which this process passes on as SIGTERM.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from pocl_cli.cli import main; main()"
    words = ["evaluate", *(["--wait"] if one.run.waits else []), *one.run.options, *one.run.overrides]
    get_logger().debug("%s: pocl %s", one.cell, shlex.join(words))
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the run has ended)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )
    return _Running(one, process, stderr, time.monotonic())


def _errors(ended: _Running) -> list[PoclError]:
    """What a process that has ended says went wrong."""
    code = ended.process.returncode
    with ended.stderr as stderr:
        stderr.seek(0)
        text = stderr.read().decode("utf-8", "replace")
    if code == 0:
        return []
    get_logger().debug("%s ended with %d: %s", ended.one.cell, code, text)
    mark = "pocl: error: "
    lines = [line.removeprefix(mark) for line in text.splitlines() if line.startswith(mark)]
    if code < 0 or not lines:
        how = f"the process was ended by signal {-code}" if code < 0 else f"the process ended with exit code {code}"
        lines = [f"{how} — {'the memory may have been full' if code == -9 else 'it left no reason'} — run it again"]
    return [_ToldError(f"{ended.one.cell}: {line}", 8 if code < 0 else code) for line in lines]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks the runs to end, so that they write their checkpoints, and makes sure of it."""
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        with suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _tell(number: int, total: int, one: ArmRun, started: float, *, failed: bool) -> None:
    how = "failed after" if failed else "done in"
    get_logger().info("run %d of %d: %s: %s %s", number, total, one.cell, how, duration(time.monotonic() - started))
