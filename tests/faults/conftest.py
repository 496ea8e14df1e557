"""Trials write checkpoints all the time: their folders are in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.folders import memory_folder
from ..support.trials import check_nothing_is_left, results, traced


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of all four commands: the bytes it leaves, its events in order, and how long it took."""

    results: Mapping[str, str]
    events: list[tuple[str, str]]
    seconds: float

    def numbers(self, *events: str) -> list[int]:
        """The places of these events among all events, from 1: the N of `ACTION:any:N`."""
        return [number for number, (event, _) in enumerate(self.events, start=1) if event in events]


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    with memory_folder() as folder:
        started = time.monotonic()
        events = traced(folder / "undisturbed")
        seconds = time.monotonic() - started
        check_nothing_is_left(folder / "undisturbed")
        yield Reference(results(folder / "undisturbed"), events, seconds)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder
