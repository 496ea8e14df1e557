"""Runs `torch.distributed.run` so that it dies with the command which started it, and tells how workers failed.

usage: python -m pocl_cli.processes.agent FOLDER torch.distributed.run ARGUMENTS…
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from pocl_cli.processes import lifeline
from pocl_cli.processes.job import Meeting


def main() -> None:
    lifeline.die_with_parent()
    os.environ[lifeline.PARENT] = str(os.getpid())
    meeting, arguments = Meeting(Path(sys.argv[1])), sys.argv[3:]
    # What went wrong is told once, by the command.
    logging.disable(logging.CRITICAL)

    from torch.distributed import run  # seconds
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        meeting.write_ends({rank: failure.exitcode for rank, failure in error.failures.items()})
        sys.exit(1)


if __name__ == "__main__":
    main()
