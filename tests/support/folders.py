"""Where tests write."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: tests that flush a real disk thousands of times take minutes."""
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="pocl-test-") as folder:
        yield Path(folder)


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """A small file system of its own: as root nothing else is full or read-only."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
