"""One of several processes that train a student; `pocl distill` starts it. Knows nothing of Hydra.

usage: python -m pocl_cli.worker FOLDER RANK
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from pocl_cli import cli, log
from pocl_cli.errors import Interrupted, PoclError
from pocl_cli.redaction import scrub

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Trains with the others; how it ended is in a file of the folder, for the command that started it."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    job = json.loads((folder / "job.json").read_bytes())
    _die_with(job["controller"])
    _leave_signals_to_the_first(rank)
    code = cli.exit_code_of(lambda: _work(folder, rank, job), lambda error: _tell(folder, rank, error))
    log.get_logger().debug("worker %d ends with exit code %d", rank, code)
    sys.stderr.flush()
    # No destructor of torch waits for a process that may be gone.
    os._exit(code)


def _die_with(controller: int) -> None:
    """Lets the kernel end this process when the command that started it ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != controller:  # it ended before
        os._exit(1)


def _leave_signals_to_the_first(rank: int) -> None:
    """Only the process that writes checkpoints is interrupted; the command ends the others."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if rank else _raise_interrupted)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted(
        "interrupted",
        why=signal.Signals(number).name,
        fix="the same command goes on where it was",
        exit_code=128 + number,
    )


def _work(folder: Path, rank: int, job: Mapping[str, Any]) -> None:
    os.chdir(job["working_folder"])
    log.set_up_console_log(job["log"]["level"] if rank == 0 else 40)
    if job["log"]["path"]:
        log.set_up_run_log(Path(job["log"]["path"]))

    # What needs torch takes seconds to import; until now this process can already be ended.
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.run import Run
    from pocl_cli.steps.chain import Chain
    from pocl_cli.steps.train import train_student
    from pocl_cli.steps.workers import write_status
    from pocl_cli.training.parallel import join
    from pocl_cli.validation import from_plain_values

    config = from_plain_values(job["config"])
    chain = Chain(Run("distill", config, tuple(job["overrides"]), job["resolved"], tuple(job["options"])))
    assert chain.student_key.id == job["student"], "a worker trains the student that the command asked for"
    device = set_up_hardware(config.hardware, rank=rank).device
    size, timeout_seconds = config.hardware.num_processes, config.hardware.timeout_seconds
    with join(rank, size, folder, device=device, timeout_seconds=timeout_seconds) as processes:
        trained = train_student(chain, Path(job["work"]), processes)
    write_status(folder, rank, {"exit_code": 0, "trained": trained._asdict()})


def _tell(folder: Path, rank: int, error: BaseException) -> int:
    """Leaves the error for the command, which shows it; the exit code."""
    from pocl_cli.steps.workers import write_status

    log.get_logger().debug("worker %d stopped", rank, exc_info=error)
    if os.environ.get("POCL_DEBUG") == "1":
        print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
    if isinstance(error, PoclError | Interrupted):
        parts = {name: getattr(error, name, None) for name in ("what", "where", "why", "fix")}
        code = error.exit_code
    else:
        line, code = cli.unforeseen(error)
        parts = {"what": line}
    write_status(folder, rank, {"exit_code": code, **parts})
    return code


if __name__ == "__main__":
    main()
