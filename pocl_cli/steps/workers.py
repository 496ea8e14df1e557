"""Training in several processes of this machine: starts them, watches them, and tells what became of them.

The command holds the lock of the work and commits what the workers leave. They hold the lock too, die with the command,
and meet through a file in a private folder. No launcher: nothing listens, and every worker's own error is told.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli import log
from pocl_cli.artifacts import durable
from pocl_cli.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    Interrupted,
    LockedError,
    NonFiniteError,
    PoclError,
    ResourceError,
    SecurityError,
    WorkerError,
)
from pocl_cli.redaction import scrub_command
from pocl_cli.steps.train import Trained
from pocl_cli.validation import plain_values

if TYPE_CHECKING:
    from types import FrameType

    from pocl_cli.artifacts.work import Work
    from pocl_cli.steps.chain import Chain

# In the work folder: what the workers are to do, how each ended, and the file through which they meet.
FOLDER = "workers"
JOB = "job.json"

_LOOK_SECONDS = 0.05
# After one worker has failed, the others notice; so long they may tell of a reason of their own.
_SETTLE_SECONDS = 2.0
_ERRORS: dict[int, type[PoclError]] = {
    kind.exit_code: kind
    for kind in (
        PoclError,
        ConfigError,
        DataError,
        ArtifactError,
        ResourceError,
        LockedError,
        NonFiniteError,
        WorkerError,
        SecurityError,
    )
}


def train_student(chain: Chain, work: Work) -> Trained:
    """As `train.train_student`, in as many processes as `hardware.num_processes` says.

    Raises:
        PoclError: the error of the worker that failed, or WorkerError where one died or hung.
        Interrupted: SIGTERM or SIGINT came; a checkpoint of the last whole step was written.
    """
    hardware = chain.config.hardware
    folder = (work.path / FOLDER).resolve()
    durable.remove_tree(folder)
    durable.make_folder(folder)
    folder.chmod(0o700)
    threads = hardware.num_threads or max(1, _num_cores() // hardware.num_processes)
    durable.write_json(folder / JOB, _job(chain, work, threads))
    workers: list[subprocess.Popen[bytes]] = []
    with _signals_kept() as signals:
        try:
            for rank in range(hardware.num_processes):
                workers.append(_started(folder, rank, threads, work.lock))
            _watch(workers, signals, hardware.timeout_seconds)
            alive = _settled(workers)
        finally:
            _end(workers)
    failure = _failure(folder, workers, alive, signals, hardware.timeout_seconds)
    if failure is not None:
        raise failure
    return Trained(**_status(folder, 0)["trained"])


def write_status(folder: Path, rank: int, status: dict[str, Any]) -> None:
    """Leaves how a worker ended for `train_student`.

    Args:
        folder: the private one.
        rank: of the worker.
        status: `exit_code`; beside it the parts of the error, or `trained`.
    """
    durable.write_json(folder / f"status-{rank}.json", status)


def _status(folder: Path, rank: int) -> dict[str, Any]:
    """What the worker left; an empty mapping where it died before."""
    path = folder / f"status-{rank}.json"
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _job(chain: Chain, work: Work, threads: int) -> dict[str, Any]:
    """What a worker needs to know, secrets taken out of the arguments."""
    level, path = log.places()
    config = plain_values(chain.made)
    config["hardware"]["num_threads"] = threads
    return {
        "controller": os.getpid(),
        "working_folder": os.getcwd(),
        "work": str(work.path),
        "student": chain.student_key.id,
        "config": config,
        "overrides": scrub_command(chain.run.overrides),
        "options": scrub_command(chain.run.options),
        "resolved": dict(chain.run.resolved),
        "log": {"level": level, "path": str(path.resolve()) if path else None},
    }


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _started(folder: Path, rank: int, threads: int, lock: int | None) -> subprocess.Popen[bytes]:
    """A worker with the modules of this process, in the private folder: no file of the user's stands in for a module.

    A session of its own keeps Ctrl-C from it, which this process passes on.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(threads),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pocl_cli.worker", str(folder), str(rank)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=2,  # the standard output is for the result
        pass_fds=() if lock is None else (lock,),
        start_new_session=True,
    )


@contextmanager
def _signals_kept() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT for the first worker; a second SIGINT raises KeyboardInterrupt."""
    kept: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in kept:
            raise KeyboardInterrupt
        kept.append(number)

    before = {number: signal.signal(number, keep) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[subprocess.Popen[bytes]], signals: Sequence[int], timeout_seconds: float) -> None:
    """Returns when all are done, when one has failed, or when one stays behind the others for too long."""
    passed_on, first_end = 0, None
    while True:
        codes = [worker.poll() for worker in workers]
        if any(codes) or None not in codes:
            return
        if 0 in codes:
            first_end = first_end or time.monotonic()
            if time.monotonic() - first_end > timeout_seconds:
                return
        for number in signals[passed_on:]:
            workers[0].send_signal(number)
            passed_on += 1
        time.sleep(_LOOK_SECONDS)


def _settled(workers: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Waits a little for those that end by themselves; the ranks of those that do not."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return {rank for rank, worker in enumerate(workers) if worker.poll() is None}


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()


def _failure(
    folder: Path,
    workers: Sequence[subprocess.Popen[bytes]],
    alive: set[int],
    signals: Sequence[int],
    timeout_seconds: float,
) -> PoclError | Interrupted | None:
    """What the user is told: a worker's own error before those of workers that only missed another one."""
    statuses = [_status(folder, rank) for rank in range(len(workers))]
    told = [status for status in statuses if status.get("exit_code")]
    own = [status for status in told if status["exit_code"] != WorkerError.exit_code]
    if own:
        return _told(own[0])
    ended = {rank: worker.returncode for rank, worker in enumerate(workers) if rank not in alive and not statuses[rank]}
    if signals and ended.get(0) == -signals[0]:  # before it could say so
        return _told({"exit_code": 128 + signals[0], "what": "interrupted", "why": signal.Signals(signals[0]).name})
    for rank, code in ended.items():
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"worker process {rank} of {len(workers)} {how}",
            why="SIGKILL often means that the memory was full" if code == -signal.SIGKILL else "it left no reason",
            fix="the same command goes on from the last checkpoint",
        )
    for rank in sorted(alive):
        return WorkerError(
            f"worker process {rank} of {len(workers)} does not answer",
            why=f"the others waited hardware.timeout_seconds={timeout_seconds} for it",
            fix="the same command goes on from the last checkpoint",
        )
    return _told(told[0]) if told else None


def _told(status: dict[str, Any]) -> PoclError | Interrupted:
    """The error that a worker told of."""
    code, parts = status["exit_code"], {name: status.get(name) for name in ("where", "why", "fix")}
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        fix = parts["fix"] or "the same command goes on where it was"
        return Interrupted(status["what"], why=str(parts["why"]), fix=fix, exit_code=code)
    return _ERRORS[code](status["what"], **parts)
