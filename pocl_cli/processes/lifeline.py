"""What ties a process to the one that started it: it dies with its parent, and shows that it is alive."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

BEAT_SECONDS = 1.0
# The process that must be this one's parent, by its id: an environment variable.
PARENT = "POCL_PARENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Lets the kernel end this process when its parent ends, however that happens; ends it now where that is over.

    Linux only; elsewhere a process notices at its start, and then no more.
    """
    die_with_launcher()
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)


def die_with_launcher() -> None:
    """As `die_with_parent`, for a parent whose id nobody has noted."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def beat(path: Path) -> None:
    """Touches the file `path` from now on, for as long as this process lives and is not stopped."""
    threading.Thread(target=_beat, args=(path,), daemon=True, name="heartbeat").start()


def _beat(path: Path) -> None:
    while True:
        try:
            os.utime(path)
        except FileNotFoundError:  # whoever listened is done
            return
        time.sleep(BEAT_SECONDS)
