"""Models on the Hugging Face hub: which commit a name means, and its files in the local cache. Free of torch."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]

from pocl_cli.artifacts.disk import reported
from pocl_cli.errors import ConfigError, PoclError, ResourceError
from pocl_cli.log import get_logger
from pocl_cli.models import folder

T = TypeVar("T")

# One request decides whether the hub can be reached. A name server that does not answer takes longer than any
# time-out of the HTTP client, hence the second limit around it.
REQUEST_SECONDS = 5.0
ANSWER_SECONDS = 8.0
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
# The HTTP client's own base error: httpx or httpx2, by the version of huggingface_hub.
_HTTPError = cast(type[Exception], HfHubHTTPError.__bases__[0])
_SETTINGS = [folder.CONFIG, folder.GENERATION_CONFIG, *folder.TOKENIZER_PATTERNS]


@dataclass(frozen=True)
class HubCommit:
    """One commit of a repository, and the revision (null: the main branch) that it was asked for as.

    `online`: the hub was reached, so that files which are not in the cache can be fetched. `pickled`: its weights are,
    and that was allowed.
    """

    repo_id: str
    revision: str | None
    commit: str
    online: bool
    pickled: bool = False


def resolve_commit(
    repo_id: str, revision: str | None, *, needs_weights: bool = True, allow_pickle: bool = False
) -> HubCommit:
    """The commit that `revision` (a branch, a tag or a commit; the main branch where null) now means.

    Where the hub cannot be reached, the newest commit in the local cache stands in, with a warning. Answers within
    about 8 seconds.

    Raises:
        ConfigError: `repo_id` is not a hub id.
        ResourceError: the hub cannot be reached and the cache has nothing, or it has no such repository or revision.
        ArtifactError, SecurityError: the repository holds no model that can be loaded (see `folder.check_names`).
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} is neither a folder nor a hub id",
            why="there is no such folder, and a hub id looks like owner/name",
            fix="correct the path",
        ) from error
    try:
        info = _within(ANSWER_SECONDS, lambda: HfApi().model_info(repo_id, revision=revision, timeout=REQUEST_SECONDS))
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(repo_id, revision, error) from error
    except (_HTTPError, OfflineModeIsEnabled, FutureTimeoutError, OSError) as error:
        cached = _cached_commit(repo_id, revision)
        if cached is None:
            raise _unreachable(repo_id, error) from error
        get_logger().warning("%s; using commit %s of %s from the local cache", _reason(error), cached[:12], repo_id)
        commit = HubCommit(repo_id, revision, cached, online=False)
        return replace(commit, pickled=allow_pickle and _has_only_pickles(_snapshot(commit, _SETTINGS)))
    assert info.sha is not None, "the hub names the commit"
    pickled = False
    if needs_weights:
        names = {sibling.rfilename for sibling in info.siblings or ()}
        pickled = folder.check_names(names, repo_id, allow_pickle=allow_pickle)
    return HubCommit(repo_id, revision, info.sha, online=True, pickled=pickled)


def _has_only_pickles(path: Path) -> bool:
    """Whether a folder of the cache holds pickled weights and no others."""
    safe, pickled = (folder.WEIGHTS, folder.INDEX), (folder.PICKLED_WEIGHTS, folder.PICKLED_INDEX)
    return any((path / name).exists() for name in pickled) and not any((path / name).exists() for name in safe)


def fetch(at: HubCommit, *, weights: bool) -> Path:
    """The folder of the local cache with the commit's configuration and tokenizer, and its weights if asked for.

    Raises:
        ResourceError: a file is neither in the cache nor to be had.
        ArtifactError, SecurityError: the folder holds no model that can be loaded.
    """
    whole, index = (folder.PICKLED_WEIGHTS, folder.PICKLED_INDEX) if at.pickled else (folder.WEIGHTS, folder.INDEX)
    patterns = [*_SETTINGS, index, whole] if weights else _SETTINGS
    path = _snapshot(at, patterns)
    if weights and not (path / whole).exists() and (path / index).exists():
        path = _snapshot(at, [*patterns, *(shard.name for shard in folder.weight_files(path, pickled=at.pickled))])
    if not weights:
        folder.check_tokenizer_folder(path, shown=at.repo_id)
        return path
    if not (path / whole).exists() and not (path / index).exists():
        raise _unreachable(at.repo_id, FileNotFoundError("its weights are not in the local cache"))
    folder.check_model_folder(path, shown=at.repo_id, allow_pickle=at.pickled)
    return path


def _snapshot(at: HubCommit, patterns: list[str]) -> Path:
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        path = snapshot_download(
            at.repo_id,
            revision=at.commit,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=not at.online,
            etag_timeout=REQUEST_SECONDS,
            cache_dir=constants.HF_HUB_CACHE,
        )
        if at.online and _cached_commit(at.repo_id, at.revision) != at.commit:
            # Downloads by commit leave no trace of the branch's name, by which the cache is asked without a network.
            hf_hub_download(
                at.repo_id,
                folder.CONFIG,
                revision=at.revision,
                etag_timeout=REQUEST_SECONDS,
                cache_dir=constants.HF_HUB_CACHE,
            )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(at.repo_id, at.commit, error) from error
    except (_HTTPError, LocalEntryNotFoundError, OSError) as error:
        if getattr(error, "errno", None) in _DISK_ERRORS:
            with reported(Path(constants.HF_HUB_CACHE), "write"):
                raise
        raise _unreachable(at.repo_id, error) from error
    return Path(path)


def _cached_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit of which the cache holds a configuration: of the revision, or of the branch main as last seen."""
    found = try_to_load_from_cache(repo_id, folder.CONFIG, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`. Raises FutureTimeoutError after `seconds`; the abandoned thread dies with the program."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # carried to the caller, whatever it is
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout=seconds)


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    if isinstance(error, FutureTimeoutError):
        return f"{constants.ENDPOINT} did not answer within {ANSWER_SECONDS:g} seconds"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{constants.ENDPOINT} cannot be reached ({first_line or type(error).__name__})"


def _unreachable(repo_id: str, error: Exception) -> PoclError:
    missing = isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    return ResourceError(
        f"cannot get the model {repo_id!r}",
        where=f"the local cache {constants.HF_HUB_CACHE}",
        why=str(error) if missing else f"it is not there, and {_reason(error)}",
        fix=f"on a machine with network run `hf download {repo_id}`, then copy that cache here and set HF_HOME to it, "
        "or set path to a local folder that holds the model",
    )


def _refused(repo_id: str, revision: str | None, error: HfHubHTTPError) -> PoclError:
    if isinstance(error, RevisionNotFoundError):
        what, fix = f"the model {repo_id!r} has no revision {revision!r}", "set revision to null, or to a branch or tag"
    elif isinstance(error, GatedRepoError):
        what, fix = f"the model {repo_id!r} is gated", "accept its terms on the hub, then run `hf auth login`"
    else:
        what = f"there is no folder and no hub model {repo_id!r}"
        fix = "correct the path; for a private model run `hf auth login`"
    return ResourceError(what, where=constants.ENDPOINT, fix=fix)
