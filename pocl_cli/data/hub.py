"""Data repositories of the Hugging Face hub: which commit, which files, and the files themselves, cached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pocl_cli.errors import DataError, PoclError, ResourceError
from pocl_cli.log import get_logger

# The client waits another 3 s for a list of its own before the first request; together a silent hub costs 7 s.
TIMEOUT_SECONDS = 4.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a repository and the names of its files (offline: of those in the cache).

    `revision` is what files are asked for by: the branch or tag where the hub answered, so that the cache remembers
    what it pointed to, and the commit itself where it did not.
    """

    repository: str
    revision: str
    commit: str
    names: tuple[str, ...]


@lru_cache(maxsize=64)
def resolve(repository: str, revision: str | None) -> Snapshot:
    """The commit that a branch or tag (default: main) points to, asked once a process so that it cannot change midway.

    Raises:
        DataError: there is no such repository or revision.
        ResourceError: the hub cannot be reached, and the cache does not hold the repository.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repository, revision=revision, timeout=TIMEOUT_SECONDS)
    except _faults() as error:
        cached = None if _is_refusal(error) else _from_cache(repository, revision)
        if cached is None:
            raise _explained(repository, revision, error) from error
        message = "the hub cannot be reached: %s is read from the cache, at commit %s"
        get_logger().info(message, repository, cached.commit)
        return cached
    assert info.sha is not None, "the hub answers with the commit"
    return Snapshot(
        repository, revision or "main", info.sha, tuple(sorted(entry.rfilename for entry in info.siblings or ()))
    )


def fetch(snapshot: Snapshot, name: str) -> Path:
    """The file in the hub's cache, downloaded where it is not there yet. Raises as `resolve`."""
    path = _download(snapshot.repository, snapshot.revision, name)
    if snapshot.commit not in path.parts:
        # The branch has moved since it was resolved.
        path = _download(snapshot.repository, snapshot.commit, name)
    return path


def _download(repository: str, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, name, repo_type="dataset", revision=revision, etag_timeout=TIMEOUT_SECONDS)
    except _faults() as error:
        raise _explained(repository, revision, error) from error
    return Path(path)


def _faults() -> tuple[type[BaseException], ...]:
    # The HTTP client's own base error goes by this name whichever client the installed release uses.
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    return OSError, EntryNotFoundError, HFValidationError, HTTPError


def _is_refusal(error: BaseException) -> bool:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, HFValidationError | RepositoryNotFoundError | RevisionNotFoundError)


def _explained(repository: str, revision: str | None, error: BaseException) -> PoclError:
    if _is_refusal(error):
        of = f" at revision {revision!r}" if revision is not None else ""
        return DataError(
            f"no local file or folder {repository!r}, and the hub shows no such data set{of}",
            where="dataset.path",
            why=type(error).__name__,
            fix="check the name; a private or gated data set needs a login (hf auth login)",
        )
    return ResourceError(
        f"the data set {repository!r} is no local file or folder, and the hub cannot be reached",
        where="dataset.path",
        why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}",
        fix=(
            f"download it where there is a network (hf download {repository} --repo-type dataset --local-dir FOLDER)"
            " and give dataset.path=FOLDER"
        ),
    )


def _from_cache(repository: str, revision: str | None) -> Snapshot | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}"
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        reference = folder / "refs" / commit
        if not reference.is_file():
            return None
        commit = reference.read_text().strip()
    files = folder / "snapshots" / commit
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    return Snapshot(repository, commit, commit, tuple(names)) if names else None
