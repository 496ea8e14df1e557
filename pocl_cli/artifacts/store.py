"""The outputs folder: finished artifacts, found by what they were made from, and unfinished work beside them."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pocl_cli.artifacts import durable, lock
from pocl_cli.artifacts.disk import reported
from pocl_cli.artifacts.manifest import KINDS, MANIFEST, Artifact, ArtifactKey, load, read_manifest, verify
from pocl_cli.artifacts.work import WORK_FILE, Work, discard, read_work_file, sign
from pocl_cli.errors import ArtifactError, LockedError, ResourceError, SecurityError
from pocl_cli.redaction import scrub_values

__all__ = ["Artifact", "ArtifactKey", "Interrupted", "Store", "Work"]

_FOLDER = re.compile(r"[a-z0-9.-]+-([0-9a-f]{12})")
_PREFIX = re.compile(r"[0-9a-f]{4,12}")
_NUM_SHOWN = 5
_STALE_SECONDS = 3600


class Interrupted(NamedTuple):
    """Unfinished work that no live process seems to hold."""

    id: str
    identity: dict[str, Any]


class Store:
    """All artifacts below one outputs folder. Making a Store touches nothing.

    Args:
        outputs: the folder.
        waits: `open_work` waits for a lock that another process holds, where it is not told otherwise.
    """

    def __init__(self, outputs: Path, *, waits: bool = False) -> None:
        self.outputs, self.waits = Path(outputs), waits
        self._work_root = self.outputs / ".work"

    def find(self, key: ArtifactKey | tuple[str, str]) -> Artifact | None:
        """The finished artifact of a key, or of a kind and an id; None where there is none.

        Raises:
            ArtifactError: the folder is there and not whole.
            SecurityError: a symbolic link has its name.
        """
        kind, identifier = (key.kind, key.id) if isinstance(key, ArtifactKey) else key
        for folder in self._folders(kind):
            if folder.name.endswith(f"-{identifier}"):
                return self._load_unless_gone(folder)
        return None

    def find_all(self, keys: Sequence[ArtifactKey]) -> dict[str, Artifact]:
        """The finished artifacts of keys of one kind, by id; the kind's folder is read once. Raises as `find`."""
        wanted = {key.id for key in keys}
        found = {}
        for folder in self._folders(keys[0].kind) if keys else ():
            identifier = folder.name[-12:]
            artifact = self._load_unless_gone(folder) if identifier in wanted else None
            if artifact is not None:
                found[identifier] = artifact
        return found

    def resolve(self, reference: str, kinds: Sequence[str] = KINDS) -> Artifact:
        """The artifact that a user means by a path, a folder's name, an id or its beginning (≥ 4 digits), or `latest`.

        Raises:
            ArtifactError: nothing fits, or more than one does, or the artifact is damaged or of another kind.
            SecurityError: a symbolic link has an artifact's name.
        """
        artifact = self._at_path(reference)
        if artifact is None:
            artifact = self.newest(kinds) if reference == "latest" else self._by_name(reference, kinds)
        if artifact.kind not in kinds:
            raise ArtifactError(
                f"{reference!r} is one of the {artifact.kind}",
                where=str(artifact.path),
                why=f"one of the {' or '.join(kinds)} is needed here",
                fix=f"give one of {self._shown(self._all(kinds))}",
            )
        return artifact

    def newest(self, kinds: Sequence[str]) -> Artifact:
        """The artifact of these kinds that was finished last. Raises ArtifactError where there is none."""
        found = [(read_manifest(folder).created_at, folder) for folder in self._all(kinds)]
        if not found:
            raise ArtifactError(
                f"there are no {' or '.join(kinds)} yet", where=str(self.outputs), fix="make one first, or name a path"
            )
        return load(max(found)[1])

    def verify(self, artifact: Artifact) -> None:
        """Hashes every file of the artifact again. Raises ArtifactError at the first that differs."""
        verify(artifact)

    @contextmanager
    def open_work(
        self, key: ArtifactKey, *, summary: Mapping[str, Any] | None = None, wait: bool | None = None
    ) -> Iterator[Work]:
        """The private folder in which the artifact of `key` is made, under its lock.

        What an interrupted run left in it is still there. Look at `work.finished` first: a racing process may have
        been faster.

        Args:
            key: what the artifact is made from.
            summary: plain values for a person who finds the interrupted work.
            wait: wait for the present holder of the lock instead of failing at once; None: as the store does.

        Raises:
            LockedError: another process makes the same artifact.
            ArtifactError: the artifact is there and damaged.
            ResourceError: the outputs folder cannot be written.
            SecurityError: a symbolic link has the place of a folder, or the identity holds a secret.
        """
        _refuse_secrets(key)
        for folder in (self._work_root, self.outputs / key.kind):
            self._check_folder(folder)
            durable.make_folder(folder)
        self.tidy()
        path = self._work_root / key.id
        with lock.hold(
            self._lock_path(key.id), f"{key.kind}/{key.folder_name}", wait=self.waits if wait is None else wait
        ):
            self._check_folder(path)
            finished = self.find(key)
            if finished is not None:
                discard(path)
                yield Work(path, key, self.outputs, finished.manifest.started_at, finished=finished)
                return
            resumed = path.is_dir()
            durable.make_folder(path)
            durable.remove_temporaries(path, recursive=True, older_than_seconds=0)
            durable.remove_tree(path.with_name(f"{key.id}.staged"))
            work = Work(path, key, self.outputs, sign(path, key, summary or {}), resumed=resumed)
            with _dropped_where_empty(path):
                yield work

    def interrupted(self, kind: str, slug: str | None = None) -> list[Interrupted]:
        """Unfinished work of a kind (and slug) that no live process seems to hold, by id; see `difference`."""
        found = []
        for path in self._works():
            content = read_work_file(path)
            if content is None or content["kind"] != kind or slug not in (None, content["slug"]):
                continue
            if not lock.seems_held(self._lock_path(path.name)) and not self._is_finished(content):
                found.append(Interrupted(path.name, content["identity"]))
        return found

    def tidy(self) -> None:
        """Removes what runs that were killed at the end of a commit left behind. Never touches unfinished work."""
        try:
            for kind in KINDS:
                durable.remove_temporaries(self.outputs / kind, recursive=False, older_than_seconds=_STALE_SECONDS)
            for trash in self._work_root.glob("*.trash-*"):
                durable.remove_tree(trash)
            for path in self._works():
                content = read_work_file(path)
                if content is not None and self._is_finished(content):
                    with suppress(LockedError), lock.hold(self._lock_path(path.name), str(path)):
                        self._finish(path, content["kind"])
            for path in self._work_root.glob("*.lock"):
                if not path.with_suffix("").exists() and not lock.seems_held(path):
                    with suppress(LockedError), lock.hold(path, path.stem):
                        pass  # leaving the context removes the lock file
        except ResourceError as error:
            logging.getLogger("pocl").warning("leftovers of a killed run stay: %s", error)

    def _finish(self, path: Path, kind: str) -> None:
        durable.remove_tree(path.with_name(f"{path.name}.staged"))
        with suppress(ArtifactError):  # a damaged neighbour is for those to report who need it
            durable.point_link(self.outputs / kind / "latest", self.newest([kind]).path.name)
        discard(path)

    def _works(self) -> list[Path]:
        if not self._work_root.is_dir():
            return []
        with reported(self._work_root, "read"):
            return sorted(path for path in self._work_root.iterdir() if re.fullmatch(r"[0-9a-f]{12}", path.name))

    def _lock_path(self, identifier: str) -> Path:
        return self._work_root / f"{identifier}.lock"

    def _is_finished(self, content: Mapping[str, Any]) -> bool:
        """Whether the artifact of a work file is there and whole."""
        folder = self.outputs / str(content["kind"]) / f"{content['slug']}-{content['id']}"
        try:
            return folder.exists() and load(folder).id == content["id"]
        except (ArtifactError, SecurityError):
            return False

    def _folders(self, kind: str) -> list[Path]:
        """Everything with an artifact's name, whether or not it is a folder."""
        assert kind in KINDS, f"unknown kind {kind!r}"
        folder = self.outputs / kind
        self._check_folder(folder)
        if not folder.exists():
            return []
        with reported(folder, "read"):
            return [folder / name for name in sorted(os.listdir(folder)) if _FOLDER.fullmatch(name)]

    def _all(self, kinds: Sequence[str]) -> list[Path]:
        return [folder for kind in kinds for folder in self._folders(kind)]

    def _check_folder(self, folder: Path) -> None:
        if self.outputs.is_symlink() and not self.outputs.exists():
            raise ResourceError(
                f"{self.outputs} is a broken link",
                why=f"{os.readlink(self.outputs)} does not exist",
                fix="make that folder, or set paths.outputs=FOLDER to another one",
            )
        if self.outputs.exists() and not self.outputs.is_dir():
            raise ResourceError(
                f"{self.outputs} is a file", why="the outputs folder has that name", fix="move it, or set paths.outputs"
            )
        if folder.is_symlink():
            raise SecurityError(
                f"{folder} is a symbolic link",
                why="only the outputs folder itself may be one",
                fix="remove the link; paths.outputs=FOLDER moves all of the outputs",
            )

    def _load_unless_gone(self, folder: Path) -> Artifact | None:
        try:
            artifact = load(folder)
        except (ArtifactError, ResourceError):
            if os.path.lexists(folder):
                raise
            return None
        if artifact.kind != folder.parent.name:
            raise ArtifactError(
                f"{folder} lies among the {folder.parent.name}",
                why=f"it is one of the {artifact.kind}",
                fix=f"move it to {self.outputs / artifact.kind}",
            )
        return artifact

    def _at_path(self, reference: str) -> Artifact | None:
        path = Path(reference).expanduser()
        if "\0" in reference or not path.is_dir() or not (os.sep in reference or (path / MANIFEST).is_file()):
            return None
        # The user named this path: its links are the user's own (`outputs/students/latest`).
        folder = path.resolve()
        if not _FOLDER.fullmatch(folder.name):
            raise ArtifactError(
                f"{path} is not an artifact",
                why="the folder of one is named <name>-<id>, as the command that made it printed",
                fix="give its path, its id, or 'latest'",
            )
        return load(folder)

    def _by_name(self, reference: str, kinds: Sequence[str]) -> Artifact:
        folders = self._all(kinds)
        prefix = reference if _PREFIX.fullmatch(reference) else None
        fitting = [
            folder
            for folder in folders
            if folder.name == reference or (prefix and folder.name[-12:].startswith(prefix))
        ]
        if len(fitting) == 1:
            return load(fitting[0])
        where = ", ".join(str(self.outputs / kind) for kind in kinds)
        if fitting:
            raise ArtifactError(
                f"{reference!r} is ambiguous",
                where=where,
                why=f"it fits {self._shown(fitting)}",
                fix="give more digits",
            )
        if os.sep not in reference:
            near = difflib.get_close_matches(reference, [f.name for f in folders], n=_NUM_SHOWN, cutoff=0.3)
            folders = [folder for folder in folders if folder.name in near] or folders
        raise ArtifactError(
            f"there is no {reference!r}",
            where=where,
            why="it is neither a path nor the name, the id or the beginning of an id (4 digits or more) of an artifact",
            fix=f"there are {self._shown(folders)}" if folders else "make one first",
        )

    def _shown(self, folders: Sequence[Path]) -> str:
        names = ", ".join(folder.name for folder in folders[:_NUM_SHOWN])
        rest = len(folders) - _NUM_SHOWN
        return f"{names} and {rest} more" if rest > 0 else names or "none (there are none yet)"


@contextmanager
def _dropped_where_empty(path: Path) -> Iterator[None]:
    """Leaves no work folder behind when a run failed before it wrote anything."""
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner and path.is_dir() and os.listdir(path) == [WORK_FILE]:
            discard(path)


def _refuse_secrets(key: ArtifactKey) -> None:
    if scrub_values(key.identity) != key.identity:
        raise SecurityError(
            "a secret is part of what decides the artifact's content",
            why="it would be stored in the manifest",
            fix="take tokens and passwords out of paths and overrides; give them through the environment",
        )
