"""A part of a step in several processes of this machine: starts and watches them, and tells what became of them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pocl_cli.artifacts import durable, lock
from pocl_cli.errors import Interrupted, LockedError, PoclError, WorkerError
from pocl_cli.processes import lifeline, status
from pocl_cli.processes.job import FOLDER, LOCK, Job, Meeting

_LOOK_SECONDS = 0.05
# Until every worker has begun; importing torch on a busy disk takes its time.
_START_SECONDS = 120.0
# After one has failed: so long the others may tell of a reason of their own, and the agent how it saw them end.
_SETTLE_SECONDS = 15.0
_LAST_WORDS_SECONDS = 3.0
# Where the others have given up waiting, a worker with no beat for so long is the one they waited for.
_QUIET_SECONDS = 5.0
# Killed processes are gone when the kernel has taken their memory and their devices back.
_GONE_SECONDS = 20.0
_GOES_ON = "the same command goes on from what was saved last"


def run_together(job: Job, *, num_processes: int, num_threads: int, timeout_seconds: float) -> dict[str, Any]:
    """Does a job in several processes; what the first of them gave back.

    Args:
        job: the part of the step; its work folder's lock is held.
        num_processes: how many.
        num_threads: of each.
        timeout_seconds: how long a process may show no sign of life.

    Raises:
        PoclError: the error of the worker that failed, or WorkerError where one died or hung.
        Interrupted: SIGTERM or SIGINT came; the first worker has saved what there was to save.
        LockedError: workers of an earlier command are still at work.
    """
    with _meeting(job.work) as meeting, _signals_kept() as signals:
        meeting.write_job(job)
        agent = _started(meeting, num_processes, num_threads)
        workers = _Workers(meeting, agent, num_processes, timeout_seconds)
        try:
            workers.watch(signals)
            # Who was asked to end need not say why.
            workers.settle(_LAST_WORDS_SECONDS if signals else _SETTLE_SECONDS)
        finally:
            hung = workers.end()
        failure = _failure(workers, signals, hung)
        if failure is not None:
            raise failure
        result: dict[str, Any] = meeting.status(0)["result"]
        return result


@contextmanager
def _meeting(work: Path) -> Iterator[Meeting]:
    """A new private folder in the work, once no worker of an earlier command is left; it is gone afterwards."""
    _wait_for_workers(work)
    root = work / FOLDER
    durable.remove_tree(root)
    # A worker that comes too late, of an earlier command, looks for a folder that is not there.
    folder = root / secrets.token_hex(4)
    durable.make_folder(folder)
    root.chmod(0o700)
    try:
        yield Meeting(folder)
    finally:
        durable.remove_tree(root)
        with suppress(LockedError):
            _wait_for_workers(work)


def _wait_for_workers(work: Path) -> None:
    """Waits until no worker holds its lock. Raises LockedError where one goes on."""
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        try:
            with lock.hold(work / LOCK, f"the work in {work}"):
                return
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)


def _started(meeting: Meeting, num_processes: int, num_threads: int) -> subprocess.Popen[bytes]:
    """The agent, with the modules of this process, in the private folder: no file of the user's stands in for a module.

    Rendezvous and workers meet through files; torch would listen on every interface for either.
    A session of its own keeps Ctrl-C from it, which this process passes on.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(num_threads),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        lifeline.PARENT: str(os.getpid()),
    }
    run = ["torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}", "--max-restarts=0"]
    run += ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={meeting.folder / 'agents'}"]
    run += [f"--rdzv-id={meeting.folder.name}", "--local-addr=127.0.0.1", f"--log-dir={meeting.folder / 'logs'}"]
    run += ["--module", "pocl_cli.worker", str(meeting.folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "pocl_cli.processes.agent", str(meeting.folder), *run],
        cwd=meeting.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=2,  # the standard output is for the result
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


class _Workers:
    """The workers as the controller sees them."""

    def __init__(
        self, meeting: Meeting, agent: subprocess.Popen[bytes], num_processes: int, timeout_seconds: float
    ) -> None:
        self.meeting, self.agent, self.timeout_seconds = meeting, agent, timeout_seconds
        self.ranks = range(num_processes)
        self._statuses: dict[int, dict[str, Any]] = {}
        self._beats = dict.fromkeys(self.ranks, (0, time.monotonic()))
        self._pids: dict[int, int] = {}

    def statuses(self) -> list[dict[str, Any]]:
        """How each ended, so far."""
        for rank in self.ranks:
            if not self._statuses.get(rank):
                self._statuses[rank] = self.meeting.status(rank)
        return [self._statuses[rank] for rank in self.ranks]

    def pid(self, rank: int) -> int | None:
        if rank not in self._pids and (pid := self.meeting.process(rank)):
            self._pids[rank] = pid
        return self._pids.get(rank)

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have shown no sign of life for so long, and have not ended."""
        now = time.monotonic()
        for rank, (before, _) in self._beats.items():
            if (beat := self.meeting.last_beat(rank)) != before:
                self._beats[rank] = (beat, now)
        limits = {rank: seconds if beat else max(seconds, _START_SECONDS) for rank, (beat, _) in self._beats.items()}
        ended = self.statuses()
        return [rank for rank in self.ranks if not ended[rank] and now - self._beats[rank][1] > limits[rank]]

    def watch(self, signals: Sequence[int]) -> None:
        """Returns when all are done, when one has failed or is silent, or when the agent has ended."""
        passed_on = 0
        while self.agent.poll() is None:
            statuses = self.statuses()
            if all(statuses) or any(one.get("exit_code") for one in statuses) or self.silent(self.timeout_seconds):
                return
            if len(signals) > passed_on:
                first = self.pid(0)
                if first is None:
                    return  # nothing has begun that could be saved
                with suppress(ProcessLookupError):
                    os.kill(first, signals[passed_on])
                passed_on += 1
            time.sleep(_LOOK_SECONDS)

    def settle(self, seconds: float) -> None:
        """Waits for the agent, which ends when the workers have."""
        deadline = time.monotonic() + seconds
        while self.agent.poll() is None and time.monotonic() < deadline and not self.silent(self.timeout_seconds):
            time.sleep(_LOOK_SECONDS)

    def end(self) -> list[int]:
        """Ends what is left; the ranks that were silent until then."""
        hung = self.silent(min(self.timeout_seconds, _QUIET_SECONDS))
        running = [pid for rank in self.ranks if not self.statuses()[rank] and (pid := self.pid(rank))]
        if self.agent.poll() is None:
            # The agent still knows its workers: none of their numbers belongs to another process by now.
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.agent.kill()
        self.agent.wait()
        return hung


def _failure(workers: _Workers, signals: Sequence[int], hung: Sequence[int]) -> PoclError | Interrupted | None:
    """What the user is told: a worker's own error before those of workers that only missed another one."""
    statuses, num_processes = workers.statuses(), len(workers.ranks)
    if all(statuses) and not any(one["exit_code"] for one in statuses):
        return None
    own = status.own_error(statuses)
    if own is not None:
        return own
    if signals:
        first = statuses[0]
        return (
            status.as_error(first) if first.get("exit_code") == 128 + signals[0] else status.interrupted_by(signals[0])
        )
    for rank, code in sorted(workers.meeting.ends().items()):
        if not statuses[rank]:
            why = "SIGKILL often means that the memory was full" if code == -signal.SIGKILL else "it left no reason"
            return WorkerError(f"worker process {rank} of {num_processes} {_how(code)}", why=why, fix=_GOES_ON)
    if hung:
        return WorkerError(
            f"worker process {hung[0]} of {num_processes} does not answer",
            why=f"it was waited for as long as hardware.timeout_seconds={workers.timeout_seconds:g} allows",
            fix=_GOES_ON,
        )
    missed = [one for one in statuses if one.get("exit_code") == WorkerError.exit_code]
    if missed:
        return status.as_error(missed[0])
    how = _how(workers.agent.returncode)
    return WorkerError(f"the process that starts the workers {how}", why="they ended with it", fix=_GOES_ON)


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
