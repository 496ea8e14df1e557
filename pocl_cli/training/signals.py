"""SIGTERM and SIGINT while a model is trained: work that can be given up ends at once, the rest is finished first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
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
        self.pending = _interrupted(number)
        if self._at_once:
            raise self.pending


class JointSignals(Signals):
    """Those of processes that can only save together: the work under way is finished, then all of them stop.

    Args:
        catches: as for `Signals`.
        largest: gives the largest number that any of the processes passes to it.
    """

    def __init__(self, *, catches: bool, largest: Callable[[int], int]) -> None:
        super().__init__(catches=catches)
        self._largest = largest

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """As in `Signals`, but a signal that comes meanwhile is heeded when all processes are here the next time."""
        number = self._largest(0 if self.pending is None else self.pending.exit_code - 128)
        if number:
            self.pending = _interrupted(number)
            raise self.pending
        yield


def _interrupted(number: int) -> Interrupted:
    return Interrupted(
        "interrupted",
        why=f"{signal.Signals(number).name}; all finished steps are saved",
        fix="the same command goes on from there",
        exit_code=128 + number,
    )
