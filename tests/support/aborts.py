"""Runs that are given up on purpose, inside this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable


class Aborted(BaseException):
    """Not an Exception: nothing may swallow it."""


def abort_after(step: int) -> Callable[..., None]:
    """A `TrainingJob.show` that gives the run up after so many of its calls; the first is the first step's."""
    done = itertools.count(1)

    def show(num_steps: int, *more: object) -> None:
        if next(done) == step:
            raise Aborted

    return show


class AbortAtOperation:
    """A `faults.hook` that raises at the n-th file operation, counted from 1; `fired` says whether it came to that."""

    def __init__(self, n: int) -> None:
        self._left, self.fired = n, False

    def __call__(self, event: str, what: str) -> None:
        self._left -= 1
        if self._left == 0:
            self.fired = True
            raise Aborted
