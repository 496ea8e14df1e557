"""Trials of the recipe `fault_demo`: a forked child runs a command of it with a fault, and a rerun is compared.

torch is imported and the recipe composed once; a trial costs about a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from hydra import initialize_config_dir

from pocl_cli import cli, faults, interrupts, log
from pocl_cli.artifacts import Store
from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.artifacts.manifest import KINDS, verify
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import Interrupted
from pocl_cli.run import Run
from pocl_cli.steps import dispatch, distill, evaluate, partition, score

from .tally import trial

OUTPUTS = "outputs"
# Clock readings; manifests hold the time and the command besides.
PROMISED = ("*.safetensors", "metrics.jsonl", "consumed.parquet", "stages.json", "scores.parquet", "dropped.jsonl",
            "partition.parquet", "summary.json", "metrics.json", "predictions.jsonl", "config.json")  # fmt: skip
# Imported here so that no child has to.
STEPS = {"score": score, "partition": partition, "distill": distill, "evaluate": evaluate}


@cache
def composed(step: str) -> Run:
    """A command of the recipe; its outputs lie in the working directory."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose_run(step, ["experiment=fault_demo", "upstream=auto", f"paths.outputs={OUTPUTS}"])


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, negative for a signal that killed it; what it said; when its fault struck."""

    code: int
    stderr: str
    seconds_after_fault: float | None

    @property
    def fault_struck(self) -> bool:
        return "fault: " in self.stderr


class Child:
    """A process that runs a command of the recipe in `folder`, with the fault of a `POCL_FAULT` where one is given."""

    def __init__(
        self,
        folder: Path,
        step: str = "evaluate",
        fault: str | None = None,
        *,
        gate: int | None = None,
        closes: int | None = None,
        waits: bool = False,
    ) -> None:
        """`gate`: the reading end of a pipe; the work begins when its other end `closes`. `waits`: as `--wait`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.folder, self.fault, self.gate = replace(composed(step), waits=waits), folder, fault, gate
        self.stderr = folder / f"stderr-{time.monotonic_ns()}"
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if closes is not None:
                os.close(closes)
            self._work()

    def _work(self) -> None:
        code = 255
        try:
            os.chdir(self.folder)
            os.dup2(os.open(self.stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (pytest's own goes elsewhere)
            os.environ.update(PATH="")  # no git: it takes longer than the rest of a commit
            os.environ.pop(faults.VARIABLE, None)
            if self.fault is not None:
                os.environ[faults.VARIABLE] = self.fault
            interrupts.catch()
            log._console = None
            log.set_up_console_log()
            faults.arm()
            if self.gate is not None:
                os.read(self.gate, 1)
            try:
                dispatch.run_step(self.run)
                code = 0
            except (Exception, Interrupted, KeyboardInterrupt) as error:
                code = cli.ended_by(error)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self, within_seconds: float = 60) -> Ended:
        """Waits for the end. A child that is too slow is killed, and the test fails."""
        deadline, struck = time.monotonic() + within_seconds, None
        while time.monotonic() < deadline:
            if self.has_ended():
                after = None if struck is None else time.monotonic() - struck
                assert self._status is not None, "it has ended"
                return Ended(os.waitstatus_to_exitcode(self._status), self._said(), after)
            if struck is None and self.fault is not None and "fault: " in self._said():
                struck = time.monotonic()
            time.sleep(0.003)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"the command hung; it had said: {self._said()}")

    def has_said(self, text: str, within_seconds: float = 60) -> None:
        """Waits until it has written `text` on stderr."""
        deadline = time.monotonic() + within_seconds
        while text not in self._said():
            assert time.monotonic() < deadline, f"the command has not said {text!r}, but: {self._said()}"
            time.sleep(0.003)

    def has_ended(self) -> bool:
        if self._status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if done else None
        return self._status is not None

    def _said(self) -> str:
        return self.stderr.read_text(encoding="utf-8", errors="replace") if self.stderr.exists() else ""


def attempt(folder: Path, step: str = "evaluate", fault: str | None = None) -> Ended:
    """Runs a command of the recipe to its end, whatever that is."""
    return Child(folder, step, fault).ended()


def rerun(folder: Path, step: str = "evaluate") -> None:
    """Runs it without a fault: it has to succeed."""
    ended = attempt(folder, step)
    assert ended.code == 0, ended.stderr


def traced(folder: Path, step: str = "evaluate") -> list[tuple[str, str]]:
    """The events of an undisturbed run, in order."""
    record = folder.with_name(f"{folder.name}-events")
    folder.mkdir(exist_ok=True)
    run, pid = composed(step), os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), record.open("w", encoding="utf-8") as lines:
            os.chdir(folder)
            os.environ.update(PATH="")
            faults.hook = lambda event, what: print(json.dumps([event, what]), file=lines, flush=True)
            dispatch.run_step(run)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the undisturbed run failed"
    return [tuple(json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]


def visible(folder: Path) -> Iterator[Path]:
    """Every folder with an artifact's name."""
    for kind in KINDS:
        place = folder / OUTPUTS / kind
        if place.is_dir():
            yield from (path for path in place.iterdir() if not path.name.startswith(".") and path.name != "latest")


def check_visible_is_whole(folder: Path) -> None:
    """Whatever has an artifact's name is an artifact, with every file as its manifest says."""
    store = Store(folder / OUTPUTS)
    for path in visible(folder):
        with trial("an artifact that is visible after a fault: it is whole"):
            verify(store.resolve(path.name, [path.parent.name]))


def results(folder: Path) -> Mapping[str, str]:
    """The sha256 of every promised file of every artifact."""
    return {
        f"{artifact.parent.name}/{artifact.name}/{path.relative_to(artifact)}": sha256_file(path)
        for artifact in visible(folder)
        for pattern in PROMISED
        for path in artifact.rglob(pattern)
    }


def check_nothing_is_left(folder: Path) -> None:
    """No unfinished work, no lock."""
    assert sorted(path.name for path in (folder / OUTPUTS / ".work").iterdir()) == []
