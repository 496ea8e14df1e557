"""Child processes that hang: where they were is printed before they are ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress


def end_and_show_stacks(pids: Iterable[int]) -> None:
    """Ends children of this process. Those that have enabled `faulthandler` write the stacks of all their threads."""
    pids = list(pids)
    for number in (signal.SIGABRT, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(1)
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
