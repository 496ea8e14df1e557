"""What the disk and the system offer and refuse, said so that a person can mend it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pocl_cli.errors import ResourceError

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

_ELSEWHERE = "set paths.outputs=FOLDER (or POCL_OUTPUTS) to another place"
_FIXES = {
    errno.ENOSPC: f"free some space or {_ELSEWHERE}",
    errno.EDQUOT: f"free some of your quota or {_ELSEWHERE}",
    errno.EACCES: f"give yourself the permission or {_ELSEWHERE}",
    errno.EPERM: f"give yourself the permission or {_ELSEWHERE}",
    errno.EROFS: f"the file system is mounted read-only; {_ELSEWHERE}",
    errno.ENOTDIR: f"a part of the path is a file; move it away or {_ELSEWHERE}",
    errno.EISDIR: "a folder has the file's name; move it away",
    errno.EEXIST: f"a file has the folder's name; move it away or {_ELSEWHERE}",
    errno.ELOOP: "the path holds a symbolic link where none may be; remove the link",
    errno.ENAMETOOLONG: f"the path is too long; {_ELSEWHERE}",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
    errno.EXDEV: "the folder is on another file system; keep all of the outputs on one",
    errno.EIO: f"the disk reports an input/output error; {_ELSEWHERE}",
    errno.ENOENT: "something else removed it meanwhile; run the command again",
}


@contextmanager
def reported(path: Path, action: str) -> Iterator[None]:
    """Raises ResourceError that names `path`, the reason and the remedy in place of an OSError of the body."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        reason = os.strerror(code) if code else str(error)
        raise ResourceError(
            f"cannot {action} {path}", why=reason, fix=_FIXES.get(code, f"check the disk, or {_ELSEWHERE}")
        ) from error


def check_free_disk(path: Path, needed_bytes: int, what: str, *, otherwise: str | None = None) -> None:
    """Raises ResourceError where the disk that holds (or will hold) `path` has less than `needed_bytes` free.

    Args:
        path: need not exist.
        needed_bytes: an estimate will do.
        what: what the room is for.
        otherwise: how a person can do without it.
    """
    free = free_bytes(path)
    if free < needed_bytes:
        raise ResourceError(
            f"not enough disk space for {what}",
            where=str(path),
            why=f"about {_size(needed_bytes)} are needed and {_size(free)} are free",
            fix=f"{_FIXES[errno.ENOSPC]}; or {otherwise}" if otherwise else _FIXES[errno.ENOSPC],
        )


def free_bytes(path: Path) -> int:
    """What is free on the disk that holds `path`, or will hold it. Raises ResourceError."""
    existing = path.absolute()
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    with reported(existing, "read the free space of"):
        return shutil.disk_usage(existing).free


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def rename_without_replacing(source: Path, target: Path) -> None:
    """Renames in one step where the system can, else after a look. Raises OSError: FileExistsError at a taken name."""
    if not _renamed_by_system(source, target):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)


def _renamed_by_system(source: Path, target: Path) -> bool:
    """False where the system or the file system has no rename that refuses to replace."""
    function = _renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


@cache
def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return function
