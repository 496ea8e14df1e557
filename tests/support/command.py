"""Runs `pocl` in a child process that shares the imports of this one: one second instead of five."""

from __future__ import annotations

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
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        pid = os.fork()
        if pid == 0:
            _child(words, cwd, env or {}, streams)
        interrupts = [(interrupt_at, interrupt_by)] if interrupt_at else []
        code = _waited(pid, streams[1], interrupts, time.monotonic() + timeout_seconds)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in streams)
    return Finished(shlex.join(["pocl", *words]), code, stdout, stderr)


def _child(words: tuple[str, ...], cwd: Path, env: Mapping[str, str], streams: list[Path]) -> None:
    code = 255
    try:
        os.chdir(cwd)
        os.environ.update(env)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
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


def _waited(
    pid: int, stderr: Path, interrupts: list[tuple[Callable[[str], bool], signal.Signals]], deadline: float
) -> int:
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if interrupts and stderr.exists() and interrupts[0][0](stderr.read_text(encoding="utf-8")):
            os.kill(pid, interrupts.pop()[1])
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the command hung; it had said: {stderr.read_text(encoding='utf-8')}")
