"""Runs `pocl` in a child process that shares the imports of this one: one second instead of five."""

from __future__ import annotations

import faulthandler
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocl_cli import cli, log

from .stacks import end_and_show_stacks


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code, what it printed, and the line that asks for it."""

    command: str
    exit_code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell a person what is wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("pocl: error: ")]


@dataclass(frozen=True)
class Running:
    """A command that is at work."""

    command: str
    pid: int
    folder: tempfile.TemporaryDirectory[str]

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        path = Path(self.folder.name) / "stderr"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self, timeout_seconds: float = 100, meanwhile: Callable[[], object] = lambda: None) -> Finished:
        """Waits for its end, and calls `meanwhile` again and again until then."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                with self.folder as folder:
                    stdout, stderr = ((Path(folder) / name).read_text("utf-8") for name in ("stdout", "stderr"))
                return Finished(self.command, os.waitstatus_to_exitcode(status), stdout, stderr)
            meanwhile()
            time.sleep(0.01)
        end_and_show_stacks([self.pid])
        raise AssertionError(f"the command hung; it had said: {self.stderr}")


def start_pocl(*words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Running:
    """Starts `pocl WORDS…` in `cwd`, where its outputs go, with further environment variables."""
    folder = tempfile.TemporaryDirectory()
    pid = os.fork()
    if pid == 0:
        _child(words, cwd, env or {}, [Path(folder.name) / "stdout", Path(folder.name) / "stderr"])
    return Running(shlex.join(["pocl", *words]), pid, folder)


def run_pocl(
    *words: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    interrupt_at: Callable[[str], bool] | None = None,
    interrupt_by: signal.Signals = signal.SIGINT,
    timeout_seconds: float = 100,
) -> Finished:
    """Runs `pocl WORDS…` in `cwd`, where its outputs go.

    Args:
        words: the arguments.
        cwd: the working directory.
        env: further environment variables.
        interrupt_at: given what stderr holds so far; when it says so, the process gets a signal.
        interrupt_by: that signal; SIGINT is Ctrl-C.
        timeout_seconds: after it the process is killed, and the test fails.
    """
    running = start_pocl(*words, cwd=cwd, env=env)
    waiting = [interrupt_at] if interrupt_at else []

    def interrupt() -> None:
        if waiting and waiting[0](running.stderr):
            waiting.clear()
            os.kill(running.pid, interrupt_by)

    return running.wait(timeout_seconds, interrupt)


def _child(words: tuple[str, ...], cwd: Path, env: Mapping[str, str], streams: list[Path]) -> None:
    code = 255
    try:
        os.chdir(cwd)
        os.environ.update(env)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.enable(2)
        log._console = None
        cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
