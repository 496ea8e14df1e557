"""Training tests write checkpoints all the time: their `tmp_path` is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ...support.folders import memory_folder


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder
