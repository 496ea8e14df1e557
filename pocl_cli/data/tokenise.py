"""Token ids of a whole data set, made once for a tokenizer and its limits, and memory-mapped afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.hashing import canonical_json, short_id
from pocl_cli.data.dropped import count_reasons, reasons_text
from pocl_cli.data.encoder import Encoder, encoder_of
from pocl_cli.errors import DataError
from pocl_cli.log import get_logger, progress
from pocl_cli.records import DroppedRow, Record, TokenisedRow
from pocl_cli.schema import DatasetConfig

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

# Rises when the same records, tokenizer and limits would give other token ids, or the file another layout.
VERSION = 1
_META = b"pocl"
_CHECKSUM = b"sha256"
_BATCH_ROWS = 256


class TokenisedDataset:
    """Token ids by record id, read from a memory-mapped file.

    Attributes:
        ids: the ids of the rows that have tokens, in the order of the records.
        dropped: the records that have none, with a reason each.
        num_prompt_cut: rows whose prompt was shortened.
        num_response_cut: rows whose response was cut and has no EOS; of plain text, those that the next row goes on.
    """

    def __init__(self, batch: pyarrow.RecordBatch) -> None:
        self._prompt_ids = _Ragged(batch["prompt_ids"])
        self._response_ids = _Ragged(batch["response_ids"])
        self._prompt_cut: list[bool] = batch["prompt_cut"].to_pylist()
        self._response_cut: list[bool] = batch["response_cut"].to_pylist()
        self.ids: tuple[str, ...] = tuple(batch["id"].to_pylist())
        self._index = {row_id: index for index, row_id in enumerate(self.ids)}
        dropped = json.loads(batch.schema.metadata[_META])["dropped"]
        self.dropped = tuple(DroppedRow(location, reason, row_id) for location, reason, row_id in dropped)
        self.num_prompt_cut, self.num_response_cut = sum(self._prompt_cut), sum(self._response_cut)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, row_id: str) -> TokenisedRow:
        """The token ids of the record `row_id`, which must be one of `ids`."""
        index = self._index[row_id]
        return TokenisedRow(
            row_id,
            self._prompt_ids.values(index),
            self._response_ids.values(index),
            self._prompt_cut[index],
            self._response_cut[index],
        )

    def num_tokens(self, row_id: str) -> int:
        """The number of prompt and response tokens of the record `row_id`."""
        index = self._index[row_id]
        return self._prompt_ids.length(index) + self._response_ids.length(index)

    def summary(self) -> dict[str, int]:
        """Counts for logs and manifests: rows, cut rows, and dropped rows by reason."""
        return {
            "rows": len(self),
            "prompt_cut": self.num_prompt_cut,
            "response_cut": self.num_response_cut,
            "dropped": len(self.dropped),
            **{f"dropped: {reason}": count for reason, count in count_reasons(self.dropped).items()},
        }


class _Ragged:
    """A column of integer lists over one buffer."""

    def __init__(self, column: pyarrow.LargeListArray) -> None:
        self._values = column.values.to_numpy(zero_copy_only=True)
        self._offsets = column.offsets.to_numpy(zero_copy_only=True)

    def values(self, index: int) -> list[int]:
        values: list[int] = self._values[self._offsets[index] : self._offsets[index + 1]].tolist()
        return values

    def length(self, index: int) -> int:
        return int(self._offsets[index + 1] - self._offsets[index])


def tokenise(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: DatasetConfig,
    cache_folder: Path,
    tokenizer_hash: str,
) -> TokenisedDataset:
    """The token ids of `records`, from the cache where an earlier call left them.

    Args:
        records: rows with distinct ids, which are hashes of their content.
        tokenizer: used only where the cache has nothing.
        config: its format and limits count.
        cache_folder: where the file is kept; writers that race write the same bytes.
        tokenizer_hash: of `tokenizer`, from the function of that name.

    Raises:
        ConfigError: the tokenizer has no EOS token or no chat template, or the prompt limit leaves no room.
        DataError: every row was dropped, or the chat template does not fit one.
        ResourceError: the cache cannot be written.
    """
    limits = _limits(config, tokenizer)
    ids = hashlib.sha256("\n".join(record.id for record in records).encode()).hexdigest()
    path = cache_folder / f"{short_id([VERSION, ids, tokenizer_hash, limits])}.arrow"
    batch = _load(path)
    if batch is None:
        durable.write_bytes(path, _serialised(*_encode_all(records, encoder_of(tokenizer, config))))
        batch = _load(path)
        assert batch is not None, f"{path} was written and cannot be read back"
    tokenised = TokenisedDataset(batch)
    if not len(tokenised):
        cut = "long_prompts" if config.has_prompts else "long_documents"
        raise DataError(
            "no row has tokens",
            where=f"the data set {config.name!r}",
            why=reasons_text(tokenised.dropped) or "there are no rows",
            fix=f"raise the limits on tokens, or set dataset.{cut}=cut",
        )
    return tokenised


def _limits(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides token ids beside the records and the tokenizer's rules."""
    if config.format == "text":
        return [config.format, config.max_tokens, config.long_documents]
    limits = [config.max_tokens, config.max_prompt_tokens, config.long_prompts]
    return [*limits, config.format, tokenizer.chat_template] if config.format == "messages" else limits


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256 of what decides token ids: the tokenizer's serialised rules and its special tokens.

    Left out are the chat template, the pad token (rows hold no padding), and the truncation and padding state that a
    fast tokenizer keeps from its last call.
    """
    if tokenizer.is_fast:
        rules: Any = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        model = getattr(tokenizer, "sp_model", None)
        pieces = hashlib.sha256(model.serialized_model_proto()).hexdigest() if model is not None else None
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), pieces]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(canonical_json([rules, special]).encode()).hexdigest()


def _encode_all(records: Sequence[Record], encoder: Encoder) -> tuple[list[TokenisedRow], list[DroppedRow]]:
    rows: list[TokenisedRow] = []
    dropped: list[DroppedRow] = []
    with progress("tokenise", len(records)) as advance:
        for start in range(0, len(records), _BATCH_ROWS):
            batch = records[start : start + _BATCH_ROWS]
            for row in encoder.encode_batch(batch):
                if isinstance(row, DroppedRow):
                    dropped.append(row)
                else:
                    rows.append(row)
            advance(len(batch))
    return rows, dropped


def _serialised(rows: list[TokenisedRow], dropped: list[DroppedRow]) -> bytes:
    import pyarrow as pa

    token_ids = pa.large_list(pa.int32())
    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "prompt_ids": pa.array([row.prompt_ids for row in rows], token_ids),
        "response_ids": pa.array([row.response_ids for row in rows], token_ids),
        "prompt_cut": pa.array([row.prompt_cut for row in rows], pa.bool_()),
        "response_cut": pa.array([row.response_cut for row in rows], pa.bool_()),
    }
    meta = json.dumps({"dropped": [[row.location, row.reason, row.id] for row in dropped]}).encode()
    batch = pa.record_batch(columns)
    checksum = _checksum(batch, meta).encode()
    batch = batch.replace_schema_metadata({_META: meta, _CHECKSUM: checksum})
    sink = pa.BufferOutputStream()
    # One batch, so that every column is one buffer for _Ragged to look into.
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _load(path: Path) -> pyarrow.RecordBatch | None:
    """The file's one batch, or None where there is no file or a damaged one."""
    import pyarrow as pa

    if not path.exists():
        return None
    try:
        # The mapping lives as long as the buffers of the batch.
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        meta = batch.schema.metadata
        damage = "its checksum differs" if meta[_CHECKSUM] != _checksum(batch, meta[_META]).encode() else None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        damage = str(error)
    if damage is not None:
        get_logger().warning("the token cache %s is damaged (%s); it is made again", path, damage)
        return None
    return batch


def _checksum(batch: pyarrow.RecordBatch, meta: bytes) -> str:
    digest = hashlib.sha256(meta)
    for name in ("id", "prompt_cut", "response_cut"):
        digest.update(json.dumps(batch[name].to_pylist()).encode())
    for name in ("prompt_ids", "response_ids"):
        for numbers in (batch[name].offsets, batch[name].values):
            digest.update(memoryview(numbers.to_numpy(zero_copy_only=True)))
    return digest.hexdigest()
