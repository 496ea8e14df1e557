"""How a process ended, as plain values that another process turns back into the same error."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from pocl_cli import errors
from pocl_cli.errors import Interrupted, PoclError, WorkerError

_KINDS: dict[int, type[PoclError]] = {
    kind.exit_code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PoclError)
}
_INTERRUPTED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def done(result: Mapping[str, Any]) -> dict[str, Any]:
    """The status of a process that came to its end with a result."""
    return {"exit_code": 0, "result": dict(result)}


def of_error(error: PoclError | Interrupted) -> dict[str, Any]:
    """The status of a process that an error ended."""
    parts = {name: getattr(error, name, None) for name in ("what", "where", "why", "fix")}
    return {"exit_code": error.exit_code, **parts}


def as_error(status: Mapping[str, Any]) -> PoclError | Interrupted:
    """The error that `of_error` was given."""
    code, what = status["exit_code"], status["what"]
    if code in _INTERRUPTED:
        return Interrupted(what, why=status["why"], fix=status["fix"], exit_code=code)
    return _KINDS[code](what, where=status.get("where"), why=status.get("why"), fix=status.get("fix"))


def interrupted_by(number: int) -> Interrupted:
    """The end of a process that was asked to end before it had anything to save."""
    return Interrupted(
        "interrupted",
        why=signal.Signals(number).name,
        fix="the same command goes on where it was",
        exit_code=128 + number,
    )


def own_error(statuses: list[dict[str, Any]]) -> PoclError | None:
    """The error of the process that failed by itself: not of one that missed another, or was asked to end."""
    for status in statuses:
        if status.get("exit_code") and status["exit_code"] not in (WorkerError.exit_code, *_INTERRUPTED):
            error = as_error(status)
            assert isinstance(error, PoclError), "interruptions are left out"
            return error
    return None
