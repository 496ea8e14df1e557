"""Shards of rows that several processes measure, each in a file of its own, so that any of them may be interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pocl_cli.artifacts import durable
from pocl_cli.training.parallel import Processes

# The folder in the work that holds them.
SHARDS = "shards"

_LOOK_SECONDS = 0.2
Shard = TypeVar("Shard")


@dataclass(frozen=True)
class ShardFiles:
    """The files of one set of rows; a file is there once its shard is measured.

    Args:
        folder: where they lie.
        ending: of their names.
        first: the number of shards of the sets before this one. The processes take turns over all of them.
    """

    folder: Path
    ending: str
    first: int = 0

    def missing(self, shards: Sequence[Shard], processes: Processes) -> list[tuple[Path, Shard]]:
        """The shards which this process has to measure, with their files."""
        durable.make_folder(self.folder)
        own = [
            (self._path(number), shard)
            for number, shard in enumerate(shards)
            if (self.first + number) % processes.size == processes.rank
        ]
        return [(path, shard) for path, shard in own if not path.exists()]

    def all(self, num_shards: int) -> list[Path]:
        """The files of all shards, once every process has written its own.

        There is no limit: a process that has died or hangs is noticed by the command, which then ends this one.
        """
        paths = [self._path(number) for number in range(num_shards)]
        for path in paths:
            while not path.exists():
                time.sleep(_LOOK_SECONDS)
        return paths

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.{self.ending}"
