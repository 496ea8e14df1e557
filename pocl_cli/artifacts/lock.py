"""One run, one writer: a lock that ends with its process, whatever ends it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.disk import reported
from pocl_cli.errors import LockedError, ResourceError, SecurityError

_BUSY = (errno.EAGAIN, errno.EACCES)


class Holder(NamedTuple):
    """The process that wrote its name into a lock file last."""

    pid: int
    host: str


@contextmanager
def hold(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path` for the length of the context; processes forked meanwhile hold it too.

    Args:
        path: the lock file. It is made, and removed when the lock is released.
        what: what is locked, for the message ("the student gpt2-0123456789ab").
        wait: wait for the present holder instead of failing at once.

    Raises:
        LockedError: a live process holds the lock; names it.
        SecurityError: a symbolic link has the lock's name.
        ResourceError: the lock file cannot be made.
    """
    descriptor = _acquire(path, what, wait)
    owner = os.getpid()
    try:
        _sign(descriptor, path)
        yield
    finally:
        # A forked child that leaves the context too must not take the lock from its parent.
        try:
            if os.getpid() == owner:
                _withdraw(descriptor, path)
        finally:
            os.close(descriptor)


@contextmanager
def share(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file together with all who share it; `hold` fails until the last of them has left or died.

    Args:
        path: the lock file. It is made, and stays: whoever holds it next removes it.
        what: what is locked, for the message.

    Raises:
        LockedError: a live process holds the lock.
        SecurityError: a symbolic link has the lock's name.
        ResourceError: the lock file cannot be made.
    """
    descriptor = _acquire(path, what, wait=False, kind=fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(descriptor)


def _withdraw(descriptor: int, path: Path) -> None:
    """Removes the lock file while it is still locked: whoever opened it before sees that it lost its name."""
    try:
        with reported(path, "write"):
            os.ftruncate(descriptor, 0)
        durable.remove_file(path)
    except ResourceError as error:
        logging.getLogger("pocl").warning("%s; the lock is released all the same", error)


def _acquire(path: Path, what: str, wait: bool, kind: int = fcntl.LOCK_EX) -> int:
    while True:
        descriptor = _open(path)
        try:
            _lock(descriptor, path, what, wait, kind)
            if _is_same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    if path.is_symlink():
        raise SecurityError(
            f"{path} is a symbolic link",
            why="a lock file is never one",
            fix="remove the link, and find out who made it",
        )
    with reported(path, "make the lock file"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _lock(descriptor: int, path: Path, what: str, wait: bool, kind: int) -> None:
    with reported(path, "lock"):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            holder = read_holder(path)
            who = f"process {holder.pid} on {holder.host} holds the lock" if holder else "its lock is held"
            if not wait:
                raise LockedError(
                    f"{what} is being made by another process",
                    where=str(path),
                    why=who,
                    fix="wait for it to end (--wait does), or stop it",
                ) from None
            logging.getLogger("pocl").info("waiting for %s: %s", what, who)
            fcntl.flock(descriptor, kind)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sign(descriptor: int, path: Path) -> None:
    with reported(path, "write"):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def read_holder(path: Path) -> Holder | None:
    """Who signed the lock file; None where nobody did (yet)."""
    try:
        content = json.loads(path.read_bytes())
        return Holder(int(content["pid"]), str(content["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def seems_held(path: Path) -> bool:
    """Whether the signer of the lock file is alive, without touching the lock. For display only."""
    holder = read_holder(path)
    if holder is None:
        return False
    if holder.host != socket.gethostname():
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
