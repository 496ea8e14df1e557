"""What a person sees while a command works, all of it on stderr: log lines, progress, and the run's own log file.

The program (`cli`, and each worker process) calls `set_up_console_log` once; every other module only asks for
`get_logger()`. Until then the logger behaves like any library's and hands its records to the root logger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pocl_cli.errors import ResourceError, printable
from pocl_cli.redaction import scrub

if TYPE_CHECKING:
    from rich.console import Console

QUIET_SECONDS = 2.0  # no progress lines closer together, and none for what is over sooner

_console: Console | None = None


def get_console() -> Console:
    """The one console of the process, on stderr. Stdout belongs to the result."""
    global _console
    if _console is None:
        # rich is imported on first use: `pocl --help` has no need of it.
        from rich.console import Console

        class StderrConsole(Console):
            def on_broken_pipe(self) -> None:
                """Go on in silence where nobody reads stderr; rich would end the program and close stdout."""
                self.quiet = True

        _console = StderrConsole(stderr=True, highlight=False, markup=False, emoji=False)
    return _console


def get_logger() -> logging.Logger:
    """The logger "pocl". What goes through it has secrets and control characters removed."""
    logger = logging.getLogger("pocl")
    if not any(isinstance(known, _Cleaner) for known in logger.filters):
        logger.addFilter(_Cleaner())
        logger.setLevel(logging.DEBUG)
    return logger


def set_up_console_log(level: int = logging.INFO) -> None:
    """Shows the log on stderr from `level` up, and on stderr only. A second call changes the level."""
    logger = get_logger()
    handler = next((known for known in logger.handlers if isinstance(known, _ConsoleHandler)), None)
    if handler is None:
        handler = _ConsoleHandler()
        logger.addHandler(handler)
    handler.setLevel(level)
    # Hydra's root handler writes to stdout.
    logger.propagate = False


def places() -> tuple[int, Path | None]:
    """The console's level and the run's log file, for a process that shall log to the same places."""
    handlers = get_logger().handlers
    level = next((one.level for one in handlers if isinstance(one, _ConsoleHandler)), logging.INFO)
    return level, next((Path(one.baseFilename) for one in handlers if isinstance(one, _RunLogHandler)), None)


def set_up_run_log(path: Path) -> contextlib.ExitStack:
    """Appends everything that is logged, debug lines and tracebacks too, to the file `path` from now on.

    Returns:
        A context manager; leaving it, or its `close()`, ends the recording.

    Raises:
        ResourceError: the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _RunLogHandler(path)
    except OSError as error:
        raise ResourceError(
            "the run's log cannot be opened",
            where=str(path),
            why=error.strerror or str(error),
            fix="make the folder writable or set paths.outputs to another one",
        ) from error
    logger = get_logger()
    logger.addHandler(handler)
    recording = contextlib.ExitStack()
    recording.callback(handler.close)
    recording.callback(logger.removeHandler, handler)
    return recording


class Advance(Protocol):
    """Tells a progress display that `n` more items are finished; `note` is shown beside the rate."""

    def __call__(self, n: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Shows how far a loop of `total` items is: a bar with the time left on a terminal, else a log line per 10 %.

    Yields:
        `advance(n)`: call it when n more items are finished.
    """
    console = get_console()
    shows_bar = console.is_interactive and console.file.isatty()
    lines = _ProgressLines(description, total, level=logging.DEBUG if shows_bar else logging.INFO)
    with _bar(description, total) if shows_bar else contextlib.nullcontext(None) as advance_bar:

        def advance(n: int, note: str = "") -> None:
            if advance_bar is not None:
                advance_bar(n, note)
            lines.advance(n, note)

        try:
            yield advance
        except BaseException:
            lines.finish("stopped at")
            raise
        lines.finish("finished")


@contextlib.contextmanager
def _bar(description: str, total: int) -> Iterator[Advance]:
    from rich import progress as parts
    from rich.text import Text

    columns = (
        parts.RenderableColumn(Text(printable(description))),
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
        parts.TextColumn("{task.fields[note]}", markup=False),
    )
    with parts.Progress(*columns, console=get_console()) as display:
        task = display.add_task("", total=total, note="")
        yield lambda n, note="": display.update(task, advance=n, note=note)


class _ProgressLines:
    """Log lines at every tenth of the way and at the end; a job of less than `QUIET_SECONDS` makes none."""

    def __init__(self, description: str, total: int, level: int) -> None:
        self.description, self.total, self.level = description, total, level
        self.num_done, self.tenths = 0, 0
        self.started = self.told = time.monotonic()

    def advance(self, n: int, note: str) -> None:
        self.num_done += n
        tenths = 10 * self.num_done // self.total if self.total else 0
        now = time.monotonic()
        if tenths <= self.tenths or self.num_done >= self.total or now - self.told < QUIET_SECONDS:
            return
        self.tenths, self.told = tenths, now
        rate = self._rate()
        left = duration((self.total - self.num_done) / rate)
        template = "%s: %d of %d (%d %%), %.3g/s%s, about %s left"
        more = f", {note}" if note else ""
        self._log(template, self.description, self.num_done, self.total, 10 * tenths, rate, more, left)

    def finish(self, verb: str) -> None:
        elapsed = duration(time.monotonic() - self.started)
        if verb == "finished" and time.monotonic() - self.started < QUIET_SECONDS:
            return
        template = "%s: %s %d of %d in %s, %.3g/s"
        self._log(template, self.description, verb, self.num_done, self.total, elapsed, self._rate())

    def _rate(self) -> float:
        return self.num_done / max(time.monotonic() - self.started, 1e-6)

    def _log(self, template: str, *values: object) -> None:
        get_logger().log(self.level, template, *values)


def duration(seconds: float) -> str:
    """`seconds` for people: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Cleaner(logging.Filter):
    """Takes secrets and control characters out of a record's message and traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(scrub(record.getMessage())), ()
        if record.exc_info and not record.exc_text:
            # Formatters use a text that is already there instead of making their own.
            record.exc_text = _clean_lines(logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            record.stack_info = _clean_lines(record.stack_info)
        return True


def _clean_lines(text: str) -> str:
    return "\n".join(printable(line) for line in scrub(text).split("\n"))


class _ConsoleHandler(logging.Handler):
    """One line a record, above a bar where there is one; tracebacks only with POCL_DEBUG=1."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        style = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}.get(record.levelno, "")
        label = f"{record.levelname.lower()}: " if record.levelno != logging.INFO else ""
        line = Text(time.strftime("%H:%M:%S ", time.localtime(record.created)), style="dim")
        line.append(label, style=style).append(record.getMessage(), style="default")
        if record.exc_text and os.environ.get("POCL_DEBUG") == "1":
            line.append(f"\n{record.exc_text}")
        try:
            # Wrapping is the terminal's matter: a piped line stays one line.
            get_console().print(line, soft_wrap=True)
        except OSError:
            self.handleError(record)


class _RunLogHandler(logging.FileHandler):
    """The run's log file. It is a diary, not an artifact: it grows in place and no manifest lists it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
        self._told = False

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._tell(error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._tell(error)
        else:
            super().handleError(record)

    def _tell(self, error: OSError) -> None:
        """Says once that the file cannot be written; a full disk must not end a run through its diary."""
        if not self._told:
            self._told = True
            reason = error.strerror or str(error)
            get_console().print(f"warning: the run's log {self.baseFilename} cannot be written: {reason}")
