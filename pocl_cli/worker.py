"""One of several processes that do a part of a step; an agent starts it (see `processes`). Knows nothing of Hydra.

usage: python -m torch.distributed.run … -m pocl_cli.worker FOLDER
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from pocl_cli import cli, interrupts, log
from pocl_cli.artifacts import lock
from pocl_cli.errors import Interrupted, PoclError
from pocl_cli.processes import lifeline, status
from pocl_cli.processes.job import LOCK, Job, Meeting
from pocl_cli.redaction import scrub


def main() -> None:
    """Works with the others; how it ended is in a file of the folder, for the command that waits for it."""
    lifeline.die_with_parent()
    meeting, rank = Meeting(Path(sys.argv[1])), int(os.environ["RANK"])
    _leave_signals_to_the_first(rank)
    lifeline.beat(meeting.sign(rank))
    code = cli.exit_code_of(lambda: _work(meeting, rank), lambda error: _tell(meeting, rank, error))
    log.get_logger().debug("worker %d ends with exit code %d", rank, code)
    sys.stderr.flush()
    # No destructor of torch waits for a process that may be gone.
    os._exit(code)


def _leave_signals_to_the_first(rank: int) -> None:
    """Only the process that writes checkpoints is interrupted; the command ends the others."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if rank else _raise_interrupted)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    if not interrupts.deferred(number, frame):
        raise status.interrupted_by(number)


def _work(meeting: Meeting, rank: int) -> None:
    job = meeting.read_job()
    log.set_up_console_log(logging.ERROR if rank else job.console_level)
    if job.run_log:
        log.set_up_run_log(job.run_log)
    with lock.share(job.work / LOCK, f"the work in {job.work}"):
        meeting.write_status(rank, status.done(_result(meeting, rank, job)))


def _result(meeting: Meeting, rank: int, job: Job) -> dict[str, object]:
    # What needs torch takes seconds to import; until now this process can already be ended.
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.steps.chain import Chain
    from pocl_cli.steps.parts import find_part
    from pocl_cli.training.parallel import join

    hardware = job.run.config.hardware
    device = set_up_hardware(hardware, rank=rank).device
    size, seconds, parallel = hardware.num_processes, hardware.timeout_seconds, hardware.parallel
    with join(rank, size, meeting.folder, device=device, timeout_seconds=seconds, parallel=parallel) as processes:
        return find_part(job.part)(Chain(job.run), job.work, processes)


def _tell(meeting: Meeting, rank: int, error: BaseException) -> int:
    """Leaves the error for the command, which shows it; the exit code."""
    log.get_logger().debug("worker %d stopped", rank, exc_info=error)
    if os.environ.get("POCL_DEBUG") == "1":
        print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
    if isinstance(error, PoclError | Interrupted):
        told = status.of_error(error)
    else:
        line, code = cli.unforeseen(error)
        told = {"exit_code": code, "what": line}
    meeting.write_status(rank, told)
    return int(told["exit_code"])


if __name__ == "__main__":
    main()
