"""A commit is killed, or refused by the disk, at its n-th file operation, for every n until it survives."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocl_cli import faults
from pocl_cli.artifacts import Store
from pocl_cli.artifacts.manifest import verify
from pocl_cli.errors import ResourceError

from .conftest import make_student

_SHIPPED = ["metrics.jsonl", "model/config.json", "model/model.safetensors"]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory where there is one: flushing a real disk thousands of times takes minutes, as git does."""
    monkeypatch.setenv("PATH", "")
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="pocl-test-") as folder:
        yield Path(folder)


def _count_down(n: int, act: Callable[[str, str], None]) -> Callable[[str, str], None]:
    left = itertools.count(n - 1, -1)

    def hook(event: str, what: str) -> None:
        if event in faults.FILE_EVENTS and next(left) == 0:
            act(event, what)

    return hook


def _kill(event: str, what: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_killed_at(n: int, outputs: Path) -> bool:
    """Makes the student in a process that dies at its n-th file operation; False where it came to its end."""
    pid = os.fork()
    if pid == 0:
        faults.hook = _count_down(n, _kill)
        try:
            make_student(outputs)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"the process ended with {status}"
    return status != 0


def _check_visible_is_whole(outputs: Path) -> None:
    students = outputs / "students"
    names = [name for name in os.listdir(students) if name.startswith("tiny-")] if students.exists() else []
    for name in names:
        verify(Store(outputs).resolve(name, ["students"]))


def _check_finished(outputs: Path) -> None:
    store = Store(outputs)
    artifact = make_student(outputs)
    verify(artifact)
    assert sorted(artifact.manifest.files) == _SHIPPED
    make_student(outputs, seed=2)  # the next run clears away what the killed one left
    assert os.listdir(outputs / ".work") == []
    assert {name for name in os.listdir(outputs / "students") if name.startswith(".")} <= _young_temporaries(outputs)
    assert store.interrupted("students") == []


def _young_temporaries(outputs: Path) -> set[str]:
    """A temporary `latest` of the last hour may belong to a living process and stays."""
    return {name for name in os.listdir(outputs / "students") if name.startswith(".latest.")}


def test_commit_when_killed_at_any_operation_then_the_artifact_is_whole_or_absent_and_a_rerun_makes_it(
    memory: Path,
) -> None:
    for n in itertools.count(1):
        outputs = memory / str(n)
        was_killed = _is_killed_at(n, outputs)
        _check_visible_is_whole(outputs)
        _check_finished(outputs)
        if not was_killed:
            break

    assert n > 40, "the hook is called before every write, flush, rename and removal"


def test_commit_when_its_rerun_is_killed_too_then_a_third_run_makes_it(memory: Path) -> None:
    for n, again in itertools.product(range(4, 70, 13), range(1, 50, 12)):
        outputs = memory / f"{n}-{again}"
        _is_killed_at(n, outputs)
        _is_killed_at(again, outputs)
        _check_visible_is_whole(outputs)
        _check_finished(outputs)


def test_commit_when_the_disk_is_full_at_any_operation_then_says_so_and_a_rerun_makes_it(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_refused = 0
    for n in itertools.count(1):
        outputs = memory / str(n)
        refused = False

        def refuse_once(event: str, what: str) -> None:
            nonlocal refused
            refused = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

        with monkeypatch.context() as patched:
            patched.setattr(faults, "hook", _count_down(n, refuse_once))
            try:
                make_student(outputs)
            except ResourceError as error:
                assert "No space left" in str(error)
                num_refused += 1
        _check_visible_is_whole(outputs)
        _check_finished(outputs)
        if not refused:
            break

    assert num_refused > 30


def test_commit_when_it_renames_then_every_file_and_folder_of_the_artifact_has_been_flushed(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    at_the_rename: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def look(event: str, what: str) -> None:
        if event == "rename" and Path(what).parent.name == "students":
            at_the_rename.update(flushed)
        elif event == "link":  # a file that a library wrote has not been flushed yet
            flushed.clear()

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(faults, "hook", look)

    artifact = make_student(memory / "outputs")

    every = {path.stat().st_ino for path in (artifact.path, *artifact.path.rglob("*"))}
    assert len(every) == len(_SHIPPED) + 3
    assert every <= at_the_rename


def test_commit_when_killed_before_the_rename_then_keeps_the_checkpoints_and_the_whole_work(memory: Path) -> None:
    outputs = memory / "outputs"

    def kill_at_rename(event: str, what: str) -> None:
        if event == "rename" and Path(what).parent.name == "students":
            _kill(event, what)

    pid = os.fork()
    if pid == 0:
        faults.hook = kill_at_rename
        make_student(outputs)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL

    (interrupted,) = Store(outputs).interrupted("students", "tiny")
    assert interrupted.identity == {"train": {"seed": 1, "lr": 0.001}}
    work = outputs / ".work" / interrupted.id
    assert all((work / name).exists() for name in ("checkpoints/step-1/state.json", *_SHIPPED))
    assert not any(name.startswith("tiny-") for name in os.listdir(outputs / "students"))


def test_find_when_commits_happen_meanwhile_then_sees_whole_artifacts_only(memory: Path) -> None:
    outputs = memory / "outputs"
    pid = os.fork()
    if pid == 0:
        try:
            for seed in range(40):
                make_student(outputs, seed)
        finally:
            os._exit(0)
    seen: set[str] = set()
    store = Store(outputs)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        for name in os.listdir(outputs / "students") if (outputs / "students").exists() else []:
            if name.startswith("tiny-"):
                seen.add(store.resolve(name).id)

    assert len(seen) > 1
