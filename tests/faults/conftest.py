"""Trials write checkpoints all the time: their folders are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.folders import memory_folder
from ..support.trials import check_nothing_is_left, results, traced


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of all four commands: the bytes it leaves, and its events in order."""

    results: Mapping[str, str]
    events: list[tuple[str, str]]

    def numbers(self, *events: str) -> list[int]:
        """The places of these events among all events, from 1: the N of `ACTION:any:N`."""
        return [number for number, (event, _) in enumerate(self.events, start=1) if event in events]


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    with memory_folder() as folder:
        events = traced(folder / "undisturbed")
        check_nothing_is_left(folder / "undisturbed")
        yield Reference(results(folder / "undisturbed"), events)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder
