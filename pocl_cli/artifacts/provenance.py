"""Where and with what an artifact was made."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone

from pydantic import BaseModel, ConfigDict

_PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "numpy", "pocl-cli")
_GIT_SECONDS = 5


class GitState(BaseModel):
    """The commit that was checked out, and whether tracked files differed from it (None: git did not say in time)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    commit: str
    dirty: bool | None


def now() -> str:
    """The present time, ISO 8601 in UTC with microseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide results; a package that is not installed is left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> GitState | None:
    """The state of the repository that holds the working directory; None where there is none or git does not answer."""
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return GitState(commit=commit.strip(), dirty=None if changes is None else bool(changes.strip()))


def _git(*arguments: str) -> str | None:
    # core.fsmonitor names a program to run: a repository's own configuration must not have that say.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None
