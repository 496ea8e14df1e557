"""Finds the files of a data set: a file, a folder, a `save_to_disk` folder, or a repository of the Hugging Face hub.

Hub files are read with the same readers as local ones: rows of different shapes, dropped rows and their line numbers,
and the content that enters an id are then the same for both.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pocl_cli.data import hub
from pocl_cli.data.rows import FORMATS, SourceRow, format_of, read_arrow_streams, read_rows, unknown_format
from pocl_cli.errors import ConfigError, DataError, SecurityError, nearest
from pocl_cli.schema import DatasetConfig

HashFile = Callable[[Path], str]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from. `identity()` decides the content and needs no row; `rows()` reads them in order."""

    shown: str
    identity: Callable[[], dict[str, Any]]
    rows: Callable[[], Iterator[SourceRow]]


def locate(config: DatasetConfig, hash_file: HashFile) -> Source:
    """The source that `dataset.path` names.

    Raises:
        ConfigError: a key of the configuration does not fit the source, or the split is unknown.
        DataError: nothing is there, or which file is meant is not clear.
        ResourceError: the hub cannot be reached and its files are not in the cache.
        SecurityError: a name leads out of the folder.
    """
    assert config.path is not None
    if config.num_rows is not None:
        raise ConfigError(
            "dataset.num_rows is set for data that are not generated",
            where="dataset.num_rows",
            fix="set it to null; dataset.limit=N takes the first N usable rows",
        )
    path = Path(config.path).expanduser()
    exists = bool(config.path.strip()) and os.path.exists(path)
    if exists and config.revision is not None:
        raise ConfigError(
            "dataset.revision is set for local data",
            where=config.path,
            why="a revision is a branch, tag or commit of a hub repository",
            fix="set dataset.revision=null",
        )
    if exists:
        return _local(config, path, hash_file)
    looks_like_file = format_of(config.path) is not None or config.path.endswith("/")
    if looks_like_file or not _HUB_ID.fullmatch(config.path):
        raise _no_path(config.path, path)
    return _hub(config, config.path)


def _no_path(given: str, path: Path) -> DataError:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = nearest(path.name, beside)
    fix = f"did you mean {str(path.parent / guess)!r}?" if guess else "check dataset.path"
    return DataError(f"no file, folder or hub id {given!r}", where="dataset.path", fix=fix)


def _local(config: DatasetConfig, path: Path, hash_file: HashFile) -> Source:
    shown = str(config.path)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(config, path, hash_file)
        names = choose_files(_names_below(path), config, shown)
        return _files([(path / name, f"{shown}/{name}") for name in names], shown, hash_file)
    if not path.is_file():
        raise DataError(f"{shown} is neither a file nor a folder", where="dataset.path", fix="check dataset.path")
    if format_of(path.name) is None:
        raise unknown_format(shown)
    if config.split not in (None, "train"):
        # A preset's data_files may stay: overriding only its path must work. A split that is asked for is no default.
        raise ConfigError(
            f"no split {config.split!r} in {shown}", why="a file has only the split train", fix="set dataset.split=null"
        )
    return _files([(path, shown)], shown, hash_file)


def _files(files: list[tuple[Path, str]], shown: str, hash_file: HashFile) -> Source:
    def identity() -> dict[str, Any]:
        return {"kind": "files", "files": [[format_of(path.name), hash_file(path)] for path, _ in files]}

    def rows() -> Iterator[SourceRow]:
        for path, name in files:
            yield from read_rows(path, name)

    return Source(shown, identity, rows)


def _names_below(folder: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def choose_files(names: list[str], config: DatasetConfig, shown: str) -> list[str]:
    """The files of a folder or repository that hold the rows, in order.

    They are what `dataset.data_files` (a name or a pattern) says; else the files, or the shards of the one file, whose
    name holds the split ("train" unless given); else the only file of a known format.

    Raises:
        DataError: none fits, or several do that are no shards of one file.
        SecurityError: `dataset.data_files` leads out of the folder.
    """
    # Beside rows of other formats, a .txt file is a licence or a note.
    formats = [one for one in FORMATS if one != "txt" or config.format == "text"]
    known = [name for name in names if format_of(name) in formats]
    pattern = config.data_files
    if pattern is not None:
        if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
            raise SecurityError(
                f"data_files {pattern!r} leads out of {shown}", where="dataset.data_files", fix="name a file inside"
            )
        chosen = [name for name in known if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not chosen:
            raise _no_files(f"no data file {pattern!r} in {shown}", known)
        return chosen
    split = config.split or "train"
    token = re.compile(rf"(?<![A-Za-z0-9]){re.escape(split)}(?![A-Za-z0-9_])")
    chosen = [name for name in known if token.search(name)]
    if not chosen and (config.split in (None, "train")) and len(known) == 1:
        chosen = known
    if not chosen:
        raise _no_files(f"no file of the split {split!r} in {shown}", known)
    if len({_SHARD.sub("*", name) for name in chosen}) > 1:
        raise _no_files(f"several files of the split {split!r} in {shown}", chosen)
    return chosen


def _no_files(what: str, names: list[str]) -> DataError:
    listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    fix = f"name the file or a pattern: dataset.data_files={names[0]}" if names else "check dataset.path"
    return DataError(what, why=f"its data files are {listed or 'none'}", fix=fix)


def _saved(config: DatasetConfig, folder: Path, hash_file: HashFile) -> Source:
    """A folder that the datasets library's `save_to_disk` made. Read without it: its index may name any path."""
    shown = str(config.path)
    if (folder / "dataset_dict.json").is_file():
        splits = _plain_names(_index(folder / "dataset_dict.json", "splits"), folder / "dataset_dict.json")
        split = config.split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if split not in splits:
            guess = nearest(split, splits)
            raise ConfigError(
                f"no split {split!r} in {shown}",
                why=f"it has {', '.join(splits)}",
                fix=f"set dataset.split={guess or (splits[0] if splits else 'null')}",
            )
        folder, shown = folder / split, f"{shown}/{split}"
    elif config.split not in (None, "train"):
        raise ConfigError(
            f"no split {config.split!r} in {shown}", why="the folder holds one data set", fix="set dataset.split=null"
        )
    entries = _index(folder / "state.json", "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    paths = [folder / name for name in _plain_names(names, folder / "state.json")]

    def identity() -> dict[str, Any]:
        return {"kind": "files", "files": [["arrow", hash_file(path)] for path in paths]}

    return Source(shown, identity, lambda: read_arrow_streams(paths, shown))


def _index(path: Path, key: str) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError("damaged index", where=str(path), why=str(error), fix="save the data set again") from error
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError("damaged index", where=str(path), why=f"no list {key!r}", fix="save the data set again")
    return entries


def _plain_names(names: list[Any], where: Path) -> list[str]:
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise SecurityError(
                f"{name!r} is no plain name of a file",
                where=str(where),
                why="an index may only name files beside it",
                fix="save the data set again, and do not trust this copy",
            )
    return names


def _hub(config: DatasetConfig, repo: str) -> Source:
    snapshot = hub.resolve(repo, config.revision)
    names = choose_files(list(snapshot.names), config, repo)

    def identity() -> dict[str, Any]:
        return {"kind": "hub", "repository": repo, "commit": snapshot.commit, "files": names}

    def rows() -> Iterator[SourceRow]:
        for name in names:
            yield from read_rows(hub.fetch(snapshot, name), f"{repo}/{name}")

    return Source(repo, identity, rows)
