"""Unfinished work: a private folder that survives interruption and becomes an artifact in one rename."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pocl_cli import faults
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.manifest import (
    KINDS,
    MANIFEST,
    SCHEMA_VERSION,
    Artifact,
    ArtifactKey,
    Kind,
    Manifest,
    files_below,
    inventory,
    load,
    verify,
)
from pocl_cli.artifacts.provenance import git_state, now, package_versions
from pocl_cli.redaction import scrub_command, scrub_values

WORK_FILE = "work.json"


@dataclass(frozen=True)
class Work:
    """The private folder of an artifact in the making; its lock is held.

    Args:
        path: write here whatever shall be kept when the run is interrupted.
        key: what the artifact is made from.
        outputs: the folder of all artifacts.
        started_at: when the work began, before any interruption.
        resumed: an earlier run left something in `path`.
        finished: the artifact exists already (another process made it): there is nothing to do.
    """

    path: Path
    key: ArtifactKey
    outputs: Path
    started_at: str
    resumed: bool = False
    finished: Artifact | None = None

    def commit(
        self,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        command: Sequence[str],
        seed: int | None,
        extra: Mapping[str, Any] | None = None,
        audit: Sequence[Mapping[str, Any]] | None = None,
        exclude: Iterable[str] = (),
        started_at: str | None = None,
    ) -> Artifact:
        """Makes the artifact visible: flush every file, write the manifest, rename into place; then drops the work.

        Killed at any point, the work is whole or the artifact is: committing again is always right.

        Args:
            config: the resolved configuration, plain values.
            inputs: the ids of the artifacts that it was made from, by the part that they play.
            command: the arguments that made it.
            seed: the seed that decided the content; None where there is none.
            extra: further plain values for the manifest.
            audit: what a student's stages consumed.
            exclude: relative names of files and folders which the artifact does not get (checkpoints).
            started_at: when the work began, where that is not `self.started_at`.

        Raises:
            ArtifactError: another content has the artifact's name.
            ResourceError: the disk is full, or not writable.
            SecurityError: the work holds a symbolic link, or one has the artifact's name.
        """
        assert self.finished is None, "the artifact exists already"
        faults.reached("commit", self.key.folder_name)
        staged = self.path.with_name(f"{self.key.id}.staged")
        self._stage(staged, {WORK_FILE, *exclude})
        durable.fsync_tree(staged)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            kind=cast("Kind", self.key.kind),
            id=self.key.id,
            slug=self.key.slug,
            version=self.key.version,
            identity=dict(self.key.identity),
            config=scrub_values(config),
            inputs=dict(inputs),
            files=inventory(staged),
            extra=scrub_values(extra or {}),
            audit=None if audit is None else [dict(stage) for stage in audit],
            command=[_storable(argument) for argument in scrub_command(command)],
            git=git_state(),
            packages=package_versions(),
            seed=seed,
            started_at=started_at or self.started_at,
            created_at=now(),
            status="complete",
        )
        durable.write_json(staged / MANIFEST, manifest.sealed().model_dump())
        artifact = self._publish(staged)
        discard(self.path)
        return artifact

    def _stage(self, staged: Path, excluded: set[str]) -> None:
        """Fills `staged` with the files to ship, as hard links: the work stays whole until the artifact is visible."""
        durable.remove_tree(staged)
        durable.remove_temporaries(self.path, recursive=True, older_than_seconds=0)
        durable.make_folder(staged)
        for name, path in files_below(self.path).items():
            if not any(name == skipped or name.startswith(f"{skipped}/") for skipped in excluded):
                assert name != MANIFEST, f"{MANIFEST} is written by commit"
                durable.place_file(path, staged / name)

    def _publish(self, staged: Path) -> Artifact:
        folder = self.outputs / self.key.kind
        target = folder / self.key.folder_name
        try:
            durable.rename(staged, target)
        except FileExistsError:
            existing = load(target)
            verify(existing)
            durable.remove_tree(staged)
            return existing
        durable.point_link(folder / "latest", target.name)
        return load(target)


def _storable(argument: str) -> str:
    """An argument that is not UTF-8 reaches Python with lone surrogates; they become backslash escapes."""
    return argument.encode("utf-8", "backslashreplace").decode()


def discard(path: Path) -> None:
    """Removes a work folder, first its name: a half-removed one is never taken for work. Raises ResourceError."""
    if path.is_dir():
        trash = path.with_name(f"{path.name}.trash-{secrets.token_hex(4)}")
        durable.rename(path, trash)
        durable.remove_tree(trash)


def sign(path: Path, key: ArtifactKey, summary: Mapping[str, Any]) -> str:
    """Writes what the work is for, so that later runs can name it; returns when it began."""
    known = read_work_file(path)
    started_at = str(known["started_at"]) if known else now()
    content = {
        "kind": key.kind,
        "slug": key.slug,
        "id": key.id,
        "version": key.version,
        "identity": key.identity,
        "summary": scrub_values(summary),
        "started_at": started_at,
    }
    durable.write_json(path / WORK_FILE, content)
    return started_at


def read_work_file(path: Path) -> dict[str, Any] | None:
    """What `sign` wrote; None where it is missing or damaged, or belongs elsewhere."""
    try:
        content = json.loads((path / WORK_FILE).read_bytes())
        key = ArtifactKey(content["kind"], content["slug"], content["identity"], content["version"])
        same = key.id == content["id"] == path.name and key.slug == content["slug"] and key.kind in KINDS
        return dict(content) if same and content["started_at"] else None
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return None
