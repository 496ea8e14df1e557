"""Counts trials over many tests and test processes, for the end of the report: "1,213 of 1,213  SIGKILL at …"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_NAME = "trial"

# The properties of the test that runs now: pytest brings them from any process to the report.
properties: list[tuple[str, object]] = []


@contextmanager
def trial(claim: str) -> Iterator[None]:
    """One case of `claim`, which holds where the body comes to its end."""
    try:
        yield
    except BaseException:
        properties.append((_NAME, [claim, False]))
        raise
    properties.append((_NAME, [claim, True]))


def summary(tests: Iterable[Iterable[tuple[str, object]]]) -> list[str]:
    """A line a claim, from the properties of all tests."""
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for name, value in (one for test in tests for one in test):
        if name == _NAME:
            claim, holds = value
            tried[claim] += 1
            held[claim] += holds
    return [f"{held[claim]:>7,} of {tried[claim]:>6,}  {claim}" for claim in sorted(tried)]
