"""One place where tests let a run fail: `POCL_FAULT=ACTION:EVENT:N` fails it at its n-th event, and is inert otherwise.

Events are file operations, named as `artifacts.durable` calls them (`write`, `fsync`, `rename`, …), optimizer steps
(`step`), and the beginnings of longer work (`load`, `measure`, `decode`, `commit`). `file` counts all file operations,
`any` everything.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

from pocl_cli.errors import ConfigError

VARIABLE = "POCL_FAULT"
FILE_EVENTS = ("write", "fsync", "rename", "unlink", "mkdir", "link", "symlink")
EVENTS = ("any", "file", "step", "load", "measure", "decode", "commit", *FILE_EVENTS)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fail() -> None:
    raise RuntimeError("a fault was asked for")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill,
    "term": _terminate,
    "int": _interrupt,
    "stop": _stop,
    "full": _fill_disk,
    "raise": _fail,
}

# Called with (event, what) at every event where there is one.
hook: Callable[[str, str], None] | None = None


def reached(event: str, what: str | Path = "") -> None:
    """Tells that something is about to happen, or an optimizer step just happened; `what` says on which file or row."""
    if hook is not None:
        hook(event, str(what))


def arm() -> None:
    """Sets the fault that the environment asks for. Raises ConfigError where it cannot be read."""
    global hook
    text = os.environ.get(VARIABLE)
    if text:
        hook = fault(text)


def fault(text: str) -> Callable[[str, str], None]:
    """The hook of `ACTION:EVENT:N`. It says on stderr what it does before it does it. Raises ConfigError."""
    action, _, rest = text.partition(":")
    event, _, number = rest.partition(":")
    if action not in ACTIONS or event not in EVENTS or not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"cannot read {VARIABLE}={text!r}",
            why=f"it is ACTION:EVENT:N with an action of {', '.join(ACTIONS)} and an event of {', '.join(EVENTS)}",
            fix="unset it: it is for tests only",
        )
    left = itertools.count(int(number) - 1, -1)

    def act(happened: str, what: str) -> None:
        counts = event in ("any", happened) or (event == "file" and happened in FILE_EVENTS)
        if counts and next(left) == 0:
            os.write(2, f"fault: {text} at {happened} {what}\n".encode())
            ACTIONS[action]()

    return act
