"""Errors that are the user's to mend: each carries what, where, why, what to do, and its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PoclError(Exception):
    """A fault outside the program, printed as one line `pocl: error: what in where — why — what to do`.

    Args:
        what: the thing that is wrong, in a few words ("unknown key 'train.lrr'").
        where: the file, artifact, configuration or step in which it was seen.
        why: what makes it wrong (the value given and what is allowed).
        fix: what the user can do about it; an exact command where there is one.
    """

    exit_code = 70

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix

    def __str__(self) -> str:
        head = f"{self.what} in {self.where}" if self.where else self.what
        return printable(" — ".join(part for part in (head, self.why, self.fix) if part))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def _rebuild(kind: type[PoclError], what: str, where: str | None, why: str | None, fix: str | None) -> PoclError:
    return kind(what, where=where, why=why, fix=fix)


class ConfigError(PoclError):
    """A usage or configuration mistake."""

    exit_code = 2


class DataError(PoclError):
    """Input rows that cannot be read or used."""

    exit_code = 3


class ArtifactError(PoclError):
    """An artifact that is missing, damaged, or made from something else."""

    exit_code = 4


class ResourceError(PoclError):
    """Disk, memory, permission, or a hub that cannot be reached."""

    exit_code = 5


class LockedError(PoclError):
    """The run is locked by a live process."""

    exit_code = 6


class NonFiniteError(PoclError):
    """A loss, gradient or score that is not a finite number."""

    exit_code = 7


class WorkerError(PoclError):
    """A worker process failed or hung."""

    exit_code = 8


class SecurityError(PoclError):
    """Refused because a file or a value would run code or leave its place."""

    exit_code = 9


class Interrupted(BaseException):
    """SIGTERM or SIGINT, after what was under way has been made safe. Not an Exception: nothing may swallow it."""

    def __init__(self, what: str, *, why: str, fix: str, exit_code: int = 143) -> None:
        super().__init__(f"{what} — {why} — {fix}")
        self.what, self.why, self.fix = what, why, fix
        self.exit_code = exit_code


def nearest(name: str, allowed: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The allowed name most like `name`, or None where nothing is alike (`cutoff` 1 means equal)."""
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=cutoff)
    return found[0] if found else None


def printable(text: str) -> str:
    """`text` on one line, with control characters (terminal escapes among them) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
