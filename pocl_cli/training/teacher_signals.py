"""The teacher's hidden states on disk: an artifact a shard of rows, and one for its output head.

N response tokens of a shard, E the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from pocl_cli.artifacts import durable
from pocl_cli.log import get_logger
from pocl_cli.models.head_file import read_head, write_head
from pocl_cli.training.shards import Rows, in_shards, shard_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pocl_cli.artifacts import Artifact, ArtifactKey, Store, Work
    from pocl_cli.models.head import OutputHead
    from pocl_cli.records import TokenisedRow

HIDDEN, ROWS = "hidden.safetensors", "rows.parquet"
_ROWS_SCHEMA = pa.schema([("id", pa.string()), ("start", pa.int64()), ("num_tokens", pa.int64())])


@dataclass(frozen=True)
class _Shard:
    key: ArtifactKey
    ids: tuple[str, ...]
    num_response_tokens: int


class _OpenShard:
    """A verified shard, memory-mapped."""

    def __init__(self, artifact: Artifact) -> None:
        mapped: Any = safe_open(artifact.path / HIDDEN, framework="pt")
        self._hidden_NE = mapped.get_slice("hidden")
        rows = pq.read_table(artifact.path / ROWS).to_pylist()
        self._places = {row["id"]: slice(row["start"], row["start"] + row["num_tokens"]) for row in rows}

    def row(self, row_id: str) -> Tensor:
        hidden_nE: Tensor = self._hidden_NE[self._places[row_id]]
        return hidden_nE


class TeacherSignals:
    """The hidden states of one teacher on the response tokens of one data set's rows. Making one writes nothing.

    Shards may be added by any process, none ever changes. Every one is verified when this process first reads it.

    Args:
        store: the artifacts.
        rows: all rows of the data set, whichever of them are asked for.
        head_key: names the head's artifact.
        shard_key: names a shard's, given its number and `shard_hash`.
        commit: makes a finished work folder visible, with what the manifest says of the run.

    Raises:
        ArtifactError: a shard is damaged.
    """

    def __init__(
        self,
        store: Store,
        rows: Rows,
        *,
        head_key: ArtifactKey,
        shard_key: Callable[[int, str], ArtifactKey],
        commit: Callable[[Work], Artifact],
    ) -> None:
        self.rows = rows
        self._store, self._head_key, self._commit = store, head_key, commit
        self._shards: list[_Shard] = []
        for number, ids in enumerate(in_shards(rows)):
            shard = [rows.row(row_id) for row_id in ids]
            num_response_tokens = sum(len(row.response_ids) for row in shard)
            self._shards.append(_Shard(shard_key(number, shard_hash(shard)), ids, num_response_tokens))
        self._number = {row_id: number for number, shard in enumerate(self._shards) for row_id in shard.ids}
        found = store.find_all([shard.key for shard in self._shards])
        self._found = {
            number: found[shard.key.id] for number, shard in enumerate(self._shards) if shard.key.id in found
        }
        self._open: dict[int, _OpenShard] = {}

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    @property
    def num_missing(self) -> int:
        """Shards that were not there when this process last looked."""
        return len(self._shards) - len(self._found)

    def missing_bytes(self, *, token_bytes: int, head_bytes: int) -> int:
        """What the shards and the head take that are not there."""
        tokens = sum(shard.num_response_tokens for i, shard in enumerate(self._shards) if i not in self._found)
        return tokens * token_bytes + (0 if self._store.find(self._head_key) else head_bytes)

    def head(self, device: torch.device) -> OutputHead | None:
        """The stored head; None where there is none yet. Raises ArtifactError at a damaged one."""
        artifact = self._store.find(self._head_key)
        if artifact is None:
            return None
        self._store.verify(artifact)
        return read_head(artifact.path, device)

    def commit_head(self, head: OutputHead) -> None:
        """Stores a plain head, unless another process has done it."""
        with self._opened_work(self._head_key) as work:
            if work.finished is None:
                write_head(work.path, head)
                self._commit(work)

    def row(self, row_id: str, compute: Callable[[list[TokenisedRow]], Tensor]) -> Tensor:
        """The hidden states of one row's response tokens `[n, E]`, on the CPU.

        Args:
            row_id: the record.
            compute: given a shard's rows, their hidden states `[N, E]`; called where the shard is not there, while
                other processes that need it wait.

        Raises:
            ArtifactError: the shard is damaged.
            ResourceError: it cannot be written.
        """
        number = self._number[row_id]
        if number not in self._open:
            artifact = self._found.get(number) or self._made(self._shards[number], compute)
            self._store.verify(artifact)
            self._found[number] = artifact
            self._open[number] = _OpenShard(artifact)
        return self._open[number].row(row_id)

    def _made(self, shard: _Shard, compute: Callable[[list[TokenisedRow]], Tensor]) -> Artifact:
        with self._opened_work(shard.key) as work:
            if work.finished is not None:
                return work.finished
            rows = [self.rows.row(row_id) for row_id in shard.ids]
            durable.write_safetensors(work.path / HIDDEN, {"hidden": compute(rows)})
            durable.write_parquet(work.path / ROWS, _rows_table(rows))
            artifact = self._commit(work)
        get_logger().debug("the teacher's signals: %s", artifact.path)
        return artifact

    def _opened_work(self, key: ArtifactKey) -> AbstractContextManager[Work]:
        return self._store.open_work(key, wait=True)


def _rows_table(rows: list[TokenisedRow]) -> pa.Table:
    places: list[dict[str, Any]] = []
    start = 0
    for row in rows:
        places.append({"id": row.id, "start": start, "num_tokens": len(row.response_ids)})
        start += len(row.response_ids)
    return pa.Table.from_pylist(places, schema=_ROWS_SCHEMA)
