"""A command that `torchrun` or `srun` started in several processes: the first leads, the others follow.

The first runs the step as if it were alone, holds the lock and commits. Where a part of the step is for all of them, it
tells the others through the launcher's store, and takes part itself.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from pocl_cli.errors import Interrupted, PoclError, WorkerError
from pocl_cli.log import get_logger
from pocl_cli.models.device import set_up_hardware
from pocl_cli.processes import lifeline, status
from pocl_cli.processes.job import Job
from pocl_cli.steps import parts
from pocl_cli.steps.chain import Chain
from pocl_cli.training.parallel import Board, Processes, join_launched

if TYPE_CHECKING:
    from pocl_cli.processes.outer import Outer
    from pocl_cli.schema import HardwareConfig

_LOOK_SECONDS = 0.2
# After one process has failed: so long the first may learn why, and the others how the first ends.
_SETTLE_SECONDS = 5.0


@dataclass
class Leader(parts.Team):
    """The first process, which tells the others what to do."""

    outer: Outer
    board: Board
    processes: Processes
    num_told: int = 0

    def do(self, job: Job) -> dict[str, Any]:
        self._tell({"job": job.to_json()})
        try:
            return parts.find_part(job.part)(Chain(job.run), job.work, self.processes)
        except WorkerError as error:
            raise self._own_error() or error from error

    def end(self, exit_code: int) -> None:
        """Lets the others end with this exit code; waits for them, as this process may keep the board."""
        self._tell({"end": exit_code})
        deadline = time.monotonic() + _SETTLE_SECONDS
        left = [f"gone-{rank}" for rank in range(1, self.outer.size)]
        while left and time.monotonic() < deadline:
            left = [name for name in left if self.board.read(name) is None]
            time.sleep(_LOOK_SECONDS)

    def _tell(self, message: dict[str, Any]) -> None:
        self.board.write(f"message-{self.num_told}", json.dumps(message))
        self.num_told += 1

    def _own_error(self) -> PoclError | None:
        """The error of the process that the others miss, where it could tell one."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline:
            told = [self.board.read(f"status-{rank}") for rank in range(1, self.outer.size)]
            error = status.own_error([json.loads(one) for one in told if one])
            if error is not None:
                return error
            time.sleep(_LOOK_SECONDS)
        return None


@contextmanager
def leading(outer: Outer, hardware: HardwareConfig) -> Iterator[None]:
    """Within it, the parts of steps are done by all processes; the others end when it does."""
    lifeline.die_with_launcher()
    with _joined(outer, hardware) as (board, processes):
        leader = Leader(outer, board, processes)
        code = PoclError.exit_code
        try:
            with parts.done_by(leader):
                yield
            code = 0
        except (PoclError, Interrupted) as error:
            code = error.exit_code
            raise
        except KeyboardInterrupt:
            code = 128 + int(signal.SIGINT)
            raise
        finally:
            leader.end(code)


def follow(outer: Outer, hardware: HardwareConfig) -> NoReturn:
    """Does its share of what the first process tells, until that ends.

    Raises:
        SystemExit: the first process ended, with its exit code; it has told why.
        PoclError: this process failed by itself.
        Interrupted: all processes stopped, and the first one tells nothing any more.
    """
    lifeline.die_with_launcher()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        # Only the process that writes checkpoints is interrupted; it lets the others end.
        signal.signal(signal_number, signal.SIG_IGN)
    with _joined(outer, hardware) as (board, processes):
        number = 0
        while "job" in (message := _message(board, number)):
            number += 1
            job = Job.from_json(message["job"])
            try:
                parts.find_part(job.part)(Chain(job.run), job.work, processes)
            except (PoclError, Interrupted) as error:
                board.write(f"status-{outer.rank}", json.dumps(status.of_error(error)))
                get_logger().debug("process %d stopped", outer.rank, exc_info=error)
                message = _message(board, number, 2 * _SETTLE_SECONDS)
                if "end" not in message:
                    raise
                break
        board.write(f"gone-{outer.rank}", "")
    raise SystemExit(message["end"])


def _message(board: Board, number: int, timeout_seconds: float = float("inf")) -> dict[str, Any]:
    """What the first process tells next; an empty mapping where it tells nothing in time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if text := board.read(f"message-{number}"):
            return dict(json.loads(text))
        time.sleep(_LOOK_SECONDS)
    return {}


@contextmanager
def _joined(outer: Outer, hardware: HardwareConfig) -> Iterator[tuple[Board, Processes]]:
    hardware = parts.launched_hardware(hardware, outer)
    device = set_up_hardware(hardware, rank=outer.local_rank).device
    seconds, parallel = hardware.timeout_seconds, hardware.parallel
    with join_launched(outer, device=device, timeout_seconds=seconds, parallel=parallel) as joined:
        yield joined
