"""What a finished artifact says about itself, and whether its folder still agrees with it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from pocl_cli.artifacts import hashing
from pocl_cli.artifacts.disk import reported
from pocl_cli.artifacts.encoding import json_text
from pocl_cli.artifacts.provenance import GitState
from pocl_cli.errors import ArtifactError, PoclError, SecurityError
from pocl_cli.paths import confined, slugify
from pocl_cli.redaction import scrub

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
Kind = Literal[
    "scores", "partitions", "answers", "teacher_signals", "students", "evaluations", "conversions", "comparisons"
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class ArtifactKey:
    """What an artifact is made from.

    Args:
        kind: one of `KINDS`.
        slug: for people, made fit for a folder's name; it does not enter the id.
        identity: plain values that decide the content: configuration, ids of inputs, content hashes.
        version: the step's version number; it rises when the step's output would change.
    """

    kind: str
    slug: str
    identity: Mapping[str, Any]
    version: int

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"unknown kind {self.kind!r}"
        object.__setattr__(self, "slug", slugify(scrub(self.slug)))
        # As it comes back from a manifest: tuples are lists, all keys are strings.
        object.__setattr__(self, "identity", json.loads(hashing.canonical_json(self.identity)))

    @cached_property
    def id(self) -> str:
        """12 hex digits of the hash of kind, version and identity."""
        return hashing.short_id({"kind": self.kind, "version": self.version, "identity": self.identity})

    @property
    def folder_name(self) -> str:
        return f"{self.slug}-{self.id}"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. Its folder never changes."""

    kind: str
    id: str
    path: Path
    manifest: Manifest


class FileEntry(BaseModel):
    """Size in bytes and sha256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """The content of `manifest.json`. `files` maps each file's relative path; times are ISO 8601 in UTC.

    `sha256` is that of the file's own text with null in its place; manifests of earlier versions have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    kind: Kind
    id: str
    slug: str
    version: int
    identity: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    extra: dict[str, Any]
    audit: list[dict[str, Any]] | None = None
    command: list[str]
    git: GitState | None
    packages: dict[str, str]
    seed: int | None
    started_at: str
    created_at: str
    status: Literal["complete"]
    sha256: str | None = None

    def sealed(self) -> Manifest:
        """The same with its `sha256`."""
        return self.model_copy(update={"sha256": _seal(self.model_dump())})


def load(folder: Path) -> Artifact:
    """The artifact in `folder`, with its manifest and the names and sizes of its files checked.

    Raises:
        ArtifactError: there is none, or it is damaged, or from a newer version.
        SecurityError: the folder is a symbolic link, or holds one.
    """
    if folder.is_symlink():
        raise SecurityError(
            f"{folder} is a symbolic link",
            why="an artifact is a folder of its own and links are not followed",
            fix="remove the link, and find out who made it",
        )
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder", why="an artifact is one", fix=_delete(folder))
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    _check_seal(folder)
    return Artifact(manifest.kind, manifest.id, folder, manifest)


def verify(artifact: Artifact) -> None:
    """Hashes every file of the artifact again. Raises ArtifactError at the first that differs."""
    check_files(artifact.path, artifact.manifest.files, rehash=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact's folder.

    Raises:
        ArtifactError: it is missing, damaged, from a newer version, or belongs to another folder.
    """
    path = folder / MANIFEST
    content = _read_json(path)
    schema_version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(schema_version, int) and schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            "the artifact was made by a newer pocl",
            where=str(path),
            why=f"its schema_version is {schema_version}, this pocl knows up to {SCHEMA_VERSION}",
            fix=f"install a newer pocl-cli, or {_delete(folder)}",
        )
    try:
        manifest = Manifest.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise _damaged(folder, f"{path} is not a manifest: {place}: {first['msg']}") from error
    expected = ArtifactKey(manifest.kind, manifest.slug, manifest.identity, manifest.version).id
    if manifest.id != expected:
        raise _damaged(folder, f"{path} gives the id {manifest.id}, and its identity has the id {expected}")
    if folder.name != f"{manifest.slug}-{manifest.id}":
        raise ArtifactError(
            "the folder has another artifact's name",
            where=str(folder),
            why=f"its manifest belongs to {manifest.slug}-{manifest.id}",
            fix=f"rename it to {manifest.slug}-{manifest.id}, or {_delete(folder)}",
        )
    return manifest


def _text(content: Mapping[str, Any]) -> bytes:
    """A manifest as `durable.write_json` writes it."""
    return (json_text(content, indent=2) + "\n").encode("utf-8", "backslashreplace")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text({**content, "sha256": None})).hexdigest()


def _check_seal(folder: Path) -> None:
    """Raises ArtifactError where any byte of a sealed manifest is another than when it was written."""
    path = folder / MANIFEST
    with reported(path, "read"):
        text = path.read_bytes()
    content = json.loads(text)
    if content.get("sha256") is not None and (content["sha256"] != _seal(content) or text != _text(content)):
        raise _damaged(folder, f"{path} has another content than when it was made (its sha256 differs)")


def _read_json(path: Path) -> Any:
    folder = path.parent
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _damaged(folder, f"{path} is not an ordinary file")
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise _damaged(folder, f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{path} is not valid JSON ({error})") from error
    except OSError as error:
        with reported(path, "read"):
            raise error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def inventory(folder: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file below `folder` except its manifest, by relative path.

    Raises SecurityError at a symbolic link.
    """
    return {
        name: FileEntry(size=os.stat(path).st_size, sha256=hashing.sha256_file(path))
        for name, path in sorted(files_below(folder).items())
        if name != MANIFEST
    }


def files_below(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its relative path. Raises SecurityError at whatever is neither file nor folder."""
    return {path.relative_to(folder).as_posix(): path for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    with reported(folder, "read"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        else:
            raise SecurityError(
                f"{entry.path} is a link or a special file",
                why="an artifact holds plain files and folders only",
                fix="remove it, and find out who made it",
            )


def check_files(folder: Path, files: Mapping[str, FileEntry], *, rehash: bool = False) -> None:
    """Compares the folder with the list of its files: names and sizes, and with `rehash` the contents.

    Raises:
        ArtifactError: a file is missing, has another size or another content, or is not listed.
        SecurityError: a listed name leads outside, or a link was planted in the folder.
    """
    for name in files:
        confined(folder, name)
    present = files_below(folder)
    for name, entry in files.items():
        path = present.get(name)
        if path is None:
            raise _damaged(folder, f"{folder / name} is missing")
        with reported(path, "read"):
            size = os.stat(path).st_size
        if size != entry.size:
            raise _damaged(folder, f"{path} has {size} bytes instead of {entry.size}")
        if rehash and hashing.sha256_file(path) != entry.sha256:
            raise _damaged(folder, f"{path} has another content than when it was made (its sha256 differs)")
    for name in sorted(present.keys() - files.keys() - {MANIFEST}):
        raise ArtifactError(
            "a file does not belong to the artifact",
            where=str(folder),
            why=f"its manifest does not list {name}",
            fix=f"rm {shlex.quote(str(folder / name))}",
        )


def _damaged(folder: Path, why: str) -> PoclError:
    return ArtifactError(
        "the artifact is damaged", where=str(folder), why=why, fix=f"{_delete(folder)}, and make it again"
    )


def _delete(folder: Path) -> str:
    return f"delete it: rm -r {shlex.quote(str(folder))}"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one line a key: "train.lr: 0.001 → 0.002"."""
    before, after = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key}: {before.get(key, '(absent)')} → {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shortened(hashing.canonical_json(entry))


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 16]}…#{hashing.short_id(text)}"
