"""Loads a data set into records, and says what decides its content before a row is read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_cli.artifacts.hashing import canonical_json, sha256_file
from pocl_cli.data.dropped import reasons_text
from pocl_cli.data.fields import FieldReader
from pocl_cli.data.locate import HashFile, Source, locate
from pocl_cli.data.rows import SourceRow, numbered
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.log import get_logger
from pocl_cli.records import DroppedRow, Record
from pocl_cli.registry import generators
from pocl_cli.schema import DatasetConfig


@dataclass(frozen=True, slots=True)
class LoadedDataset:
    """The usable rows in the order of the source, the others with a reason each, and what decides the content."""

    records: tuple[Record, ...]
    dropped: tuple[DroppedRow, ...]
    identity: dict[str, Any]


def load_dataset(config: DatasetConfig, hash_file: HashFile = sha256_file) -> LoadedDataset:
    """Reads the first `limit` usable rows (all of them where it is null).

    Args:
        config: the section `dataset`; `seed` is the generator's, too.
        hash_file: gives a file's sha256 (`HashCache.sha256_file` remembers it).

    Raises:
        ConfigError: a key of the section does not fit the source.
        DataError: the data are missing, damaged or of another shape, or no row is usable; names file and line.
        ResourceError: a file cannot be read, or the hub cannot be reached and its cache does not hold the data.
        SecurityError: a name in the configuration or in an index leads out of its folder.
    """
    source = _source(config, hash_file)
    records, dropped = _read(source, config)
    if not records:
        reasons = f"; dropped were {reasons_text(dropped)}" if dropped else ""
        raise DataError(
            "no usable row", where=source.shown, why=f"{len(dropped)} rows were read{reasons}", fix="check the file"
        )
    if dropped:
        message = "%s: %d rows are used, %d are dropped: %s"
        get_logger().warning(message, config.name, len(records), len(dropped), reasons_text(dropped))
    return LoadedDataset(tuple(records), tuple(dropped), _identity(source, config))


def dataset_identity(config: DatasetConfig, hash_file: HashFile = sha256_file) -> dict[str, Any]:
    """What decides the content of a data set, without reading its rows: enters artifact ids, holds no path of a file.

    It holds the source (sha256 of local files, commit of a hub repository, version and seed of a generator), the
    columns, the limit, the dev split and the token limits. Raises as `load_dataset`.
    """
    return _identity(_source(config, hash_file), config)


def record_id(
    instruction: str, input: str, references: Sequence[str], turns: Sequence[tuple[str, str]] | None = None
) -> str:
    """The first 16 hex digits of the sha256 of the row's canonical JSON; the same for identical rows."""
    texts: list[Any] = [instruction, input, list(references)]
    content = canonical_json(texts if turns is None else [*texts, [list(turn) for turn in turns]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _identity(source: Source, config: DatasetConfig) -> dict[str, Any]:
    identity: dict[str, Any] = {
        "source": source.identity(),
        "fields": config.fields.model_dump(),
        "limit": config.limit,
        "dev": {"size": config.dev_size, "seed": config.seed} if config.dev_size else None,
        "max_tokens": config.max_tokens,
    }
    if config.format != "instruction":
        identity["format"] = config.format
    if not config.has_prompts:
        return {**identity, "long_documents": config.long_documents}
    return {**identity, "max_prompt_tokens": config.max_prompt_tokens, "long_prompts": config.long_prompts}


def _source(config: DatasetConfig, hash_file: HashFile) -> Source:
    return locate(config, hash_file) if config.generator is None else _generated(config)


def _generated(config: DatasetConfig) -> Source:
    assert config.generator is not None, "only called where there is one"
    assert config.num_rows is not None, "the schema asks for it"
    for key, value in (("data_files", config.data_files), ("revision", config.revision)):
        if value is not None:
            raise ConfigError(
                f"dataset.{key} is set for a generated data set",
                why=f"the generator {config.generator!r} reads no files",
                fix=f"set dataset.{key}=null",
            )
    generator = generators.get(config.generator)()
    name, split, num_rows = config.generator, config.split or "train", config.num_rows

    def identity() -> dict[str, Any]:
        return {
            "kind": "generator",
            "name": name,
            "version": generator.version,
            "split": split,
            "num_rows": num_rows,
            "seed": config.seed,
        }

    def rows() -> Iterator[SourceRow]:
        return numbered(generator.rows(split, num_rows, config.seed), f"{name}/{split}")

    return Source(name, identity, rows)


def _read(source: Source, config: DatasetConfig) -> tuple[list[Record], list[DroppedRow]]:
    reader = FieldReader(config.fields, config.format)
    copies: Counter[str] = Counter()
    records: list[Record] = []
    dropped: list[DroppedRow] = []
    for row in source.rows():
        texts = reader.read(row)
        if isinstance(texts, str):
            dropped.append(DroppedRow(row.location, texts))
            continue
        row_id = record_id(texts.instruction, texts.input, texts.references, texts.turns)
        copies[row_id] += 1
        if copies[row_id] > 1:
            row_id = f"{row_id}-{copies[row_id]}"
        where = None if texts.turns is None else row.where
        records.append(
            Record(row_id, texts.instruction, texts.input, texts.references, texts.category, texts.turns, where)
        )
        if len(records) == config.limit:
            break
    reader.check_optional(source.shown)
    return records, dropped
