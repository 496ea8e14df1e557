"""SIGTERM and SIGINT as exceptions, raised only where a library lets an exception from a signal handler through."""

from __future__ import annotations

import signal
import time
from types import FrameType

from pocl_cli.errors import Interrupted

_RETRY_SECONDS = 0.05
_LONGEST_DEFERRAL_SECONDS = 8.0
# What is still at work so long after it was interrupted has caught the exception (a destructor, a bare `except`).
_AGAIN_SECONDS = 5.0

# The exception of the first signal that came.
received: Interrupted | KeyboardInterrupt | None = None
_deferred_since: float | None = None


def catch() -> None:
    """Makes both signals exceptions from now on, Interrupted and KeyboardInterrupt; they come again until `settle`."""
    global received
    received = None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise)


def settle() -> None:
    """Nothing is raised again: the program comes to its end."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def deferred(number: int, frame: FrameType | None) -> bool:
    """Whether a handler must not raise now; the signal then comes again in a moment.

    An exception in the middle of an import may end the process (abort, where a module in C++ is being made) or become
    another one (ImportError).
    """
    global _deferred_since
    if not _imports(frame):
        _deferred_since = None
        return False
    _deferred_since = _deferred_since or time.monotonic()
    if time.monotonic() - _deferred_since > _LONGEST_DEFERRAL_SECONDS:
        return False
    _deliver_again(number, _RETRY_SECONDS)
    return True


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _deliver_again(number: int, seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda alarm, frame: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _raise(number: int, frame: FrameType | None) -> None:
    global received
    if deferred(number, frame):
        return
    _deliver_again(number, _AGAIN_SECONDS)
    if number == signal.SIGINT:
        received = received or KeyboardInterrupt()
        raise KeyboardInterrupt
    received = received or Interrupted("interrupted", why="SIGTERM", fix="the same command goes on where it was")
    raise received
