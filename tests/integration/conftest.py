"""Whole runs write checkpoints all the time: their `tmp_path` is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.folders import memory_folder
from ..support.recipe import write_inputs


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory with the inputs of a small recipe in `inputs`."""
    with memory_folder() as folder:
        write_inputs(folder / "inputs")
        yield folder
