"""SIGTERM and SIGINT while a model is trained: work that can be given up ends at once, the rest is finished first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pocl_cli import interrupts
from pocl_cli.errors import Interrupted


class Signals:
    """Catches both signals until `release`. A second SIGINT raises KeyboardInterrupt wherever the program is.

    Args:
        catches: False in a process that leaves both to the one that writes checkpoints.

    Attributes:
        pending: the first signal that came, as the exception that ends the training.
    """

    def __init__(self, *, catches: bool = True) -> None:
        self.pending: Interrupted | None = None
        self._at_once = False
        caught = (signal.SIGTERM, signal.SIGINT) if catches else ()
        self._before = {number: signal.signal(number, self._keep) for number in caught}

    def release(self) -> None:
        """Gives the signals back to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that changes nothing until it is done: a signal raises Interrupted in it, or before it."""
        if self.pending is not None:
            raise self.pending
        self._at_once = True
        try:
            yield
        except Exception as error:
            if self.pending is not None:  # a library has made an exception of its own of it
                raise self.pending from error
            raise
        finally:
            self._at_once = False

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if interrupts.deferred(number, frame):
            return
        if self.pending is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.pending = Interrupted(
            "interrupted",
            why=f"{signal.Signals(number).name}; all finished steps are saved",
            fix="the same command goes on from there",
            exit_code=128 + number,
        )
        if self._at_once:
            raise self.pending
