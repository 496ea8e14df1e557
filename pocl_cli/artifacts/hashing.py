"""Content hashes and the ids made from them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.disk import reported
from pocl_cli.artifacts.encoding import json_text
from pocl_cli.errors import ArtifactError, ResourceError

_BLOCK_BYTES = 1 << 20
_SMALLEST_CACHED = 1 << 20
# A file that was written less than this ago may change again without a visible change of its time.
_SETTLED_SECONDS = 2.0
_CACHE_VERSION = 1


def canonical_json(value: Any) -> str:
    """The one JSON text of a plain value: keys sorted as strings, no spaces, tuples as lists.

    Raises NonFiniteError where a number is not finite.
    """
    # Through JSON and back, so that keys that are numbers are sorted as the strings that they become.
    plain = json.loads(json.dumps(value))
    return json_text(plain, separators=(",", ":"))


def short_id(value: Any) -> str:
    """The first 12 hex digits of the sha256 of the value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex.

    Raises:
        ResourceError: the file cannot be read, or somebody writes to it meanwhile.
    """
    digest = hashlib.sha256()
    with reported(path, "read"), open(path, "rb") as handle:
        before = os.fstat(handle.fileno())
        while block := handle.read(_BLOCK_BYTES):
            digest.update(block)
        after = os.fstat(handle.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ResourceError(
            f"cannot hash {path}", why="it changes while it is read", fix="wait until it is written, then run again"
        )
    return digest.hexdigest()


def sha256_tree(folder: Path, hash_file: Callable[[Path], str] = sha256_file) -> str:
    """The sha256 over the names and contents of all files below `folder`, in hex; names with a leading dot are ignored.

    Links are followed (a hub cache keeps its files behind links), loops of links are not.

    Raises:
        ArtifactError: an entry is neither a file nor a folder (a broken link, a pipe).
        ResourceError: a file cannot be read.
    """
    entries = sorted((path.relative_to(folder).as_posix(), path) for path in _files_below(folder, ()))
    listing = [[name, hash_file(path)] for name, path in entries]
    return hashlib.sha256(canonical_json(listing).encode()).hexdigest()


def _files_below(folder: Path, ancestors: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    with reported(folder, "read"):
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    for name in names:
        path = folder / name
        if path.is_dir():
            yield from _files_below(path, (*ancestors, real))
        elif path.is_file():
            yield path
        else:
            raise ArtifactError(
                f"cannot hash {path}", why="it is neither a file nor a folder", fix="remove it, or mend the link"
            )


class HashCache:
    """Remembers the hashes of large files in `<outputs>/.cache/hashes.json`, by path, inode, size and mtime.

    A damaged or unwritable cache costs time, never a wrong result: it is ignored, and rewritten where possible.

    Args:
        outputs: the folder of all artifacts.
        writes: False keeps the disk untouched (`plan=true`).
    """

    def __init__(self, outputs: Path, *, writes: bool = True) -> None:
        self.path = outputs / ".cache" / "hashes.json"
        self.writes = writes

    def sha256_file(self, path: Path) -> str:
        """As `hashing.sha256_file`; files of 1 MB and more are hashed once."""
        with reported(path, "read"):
            status = os.stat(path)
        if status.st_size < _SMALLEST_CACHED or not stat.S_ISREG(status.st_mode):
            return sha256_file(path)
        real = os.path.realpath(path)
        signature = [status.st_ino, status.st_size, status.st_mtime_ns]
        known = self._read().get(real)
        if known is not None and known[:3] == signature:
            return str(known[3])
        digest = sha256_file(path)
        if self.writes and time.time() - status.st_mtime > _SETTLED_SECONDS:
            self._remember(real, [*signature, digest])
        return digest

    def sha256_tree(self, folder: Path) -> str:
        """As `hashing.sha256_tree`; files of 1 MB and more are hashed once."""
        return sha256_tree(folder, self.sha256_file)

    def _read(self) -> dict[str, list[Any]]:
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("version") != _CACHE_VERSION:
            return {}
        files = content.get("files")
        if not isinstance(files, dict):
            return {}
        return {path: entry for path, entry in files.items() if _is_entry(entry)}

    def _remember(self, real: str, entry: list[Any]) -> None:
        files = {path: known for path, known in self._read().items() if os.path.exists(path)}
        try:
            durable.write_json(self.path, {"version": _CACHE_VERSION, "files": {**files, real: entry}})
        except ResourceError as error:
            logging.getLogger("pocl").warning("%s; the file is hashed again next time", error)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 4
        and all(isinstance(number, int) for number in entry[:3])
        and isinstance(entry[3], str)
        and len(entry[3]) == 64
    )
