from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocl_cli.artifacts import ArtifactKey, Store, durable, lock
from pocl_cli.errors import LockedError, ResourceError, SecurityError

from .conftest import make_student

_KEY = ArtifactKey("students", "tiny", {"train": {"seed": 1, "lr": 0.001}}, version=1)


_running: set[int] = set()


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    while _running:
        pid = _running.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            body()
            code = 0
        except LockedError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    _running.add(pid)
    return pid


def _exit_code(pid: int) -> int:
    _running.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _hold_until_told(outputs: Path) -> tuple[int, Callable[[], None]]:
    """A process that holds the work open; returns its pid and what ends it."""
    ready_read, ready_write = os.pipe()
    end_read, end_write = os.pipe()

    def body() -> None:
        with Store(outputs).open_work(_KEY) as work:
            durable.write_text(work.path / "progress", "x")
            os.write(ready_write, b"x")
            os.read(end_read, 1)

    pid = _fork(body)
    os.read(ready_read, 1)
    return pid, lambda: (os.write(end_write, b"x"), None)[1]


def test_open_work_when_a_live_process_has_it_then_fails_at_once_and_names_the_process(outputs: Path) -> None:
    pid, end = _hold_until_told(outputs)
    started = time.monotonic()

    with pytest.raises(LockedError) as caught, Store(outputs).open_work(_KEY):
        pass

    assert time.monotonic() - started < 1
    assert caught.value.exit_code == 6
    assert f"process {pid} on " in str(caught.value)
    assert _KEY.folder_name in str(caught.value)
    end()
    assert _exit_code(pid) == 0


def test_open_work_when_two_processes_race_then_one_works_and_the_other_is_told(outputs: Path) -> None:
    start_read, start_write = os.pipe()

    def body() -> None:
        os.read(start_read, 1)
        with Store(outputs).open_work(_KEY) as work:
            assert work.finished is None
            time.sleep(0.5)

    pids = [_fork(body), _fork(body)]
    os.write(start_write, b"xx")

    assert sorted(_exit_code(pid) for pid in pids) == [0, 6]


def test_open_work_when_its_holder_was_killed_then_opens_with_what_it_left(outputs: Path) -> None:
    pid, _ = _hold_until_told(outputs)
    durable.write_text(outputs / ".work" / _KEY.id / "checkpoint", "half")
    os.kill(pid, signal.SIGKILL)
    assert _exit_code(pid) == -signal.SIGKILL

    with Store(outputs).open_work(_KEY) as work:
        assert work.resumed
        assert (work.path / "checkpoint").read_text() == "half"


def test_open_work_when_many_wait_for_it_then_one_makes_the_artifact_and_the_others_are_told(outputs: Path) -> None:
    made_read, made_write = os.pipe()

    def body() -> None:
        with Store(outputs).open_work(_KEY, wait=True) as work:
            if work.finished is None:
                durable.write_text(work.path / "file", "x")
                time.sleep(0.05)
                work.commit(config={}, inputs={}, command=[], seed=None)
                os.write(made_write, b"x")

    codes = [_exit_code(pid) for pid in [_fork(body) for _ in range(8)]]
    os.close(made_write)

    assert codes == [0] * 8
    assert os.read(made_read, 100) == b"x"
    assert os.listdir(outputs / ".work") == []


def test_open_work_when_the_artifact_was_made_meanwhile_then_says_finished_and_drops_leftovers(outputs: Path) -> None:
    artifact = make_student(outputs)
    durable.write_text(outputs / ".work" / artifact.id / "leftover", "x")

    with Store(outputs).open_work(_KEY) as work:
        assert work.finished == artifact
        assert not work.path.exists()


def test_open_work_when_a_forked_child_outlives_its_parent_then_stays_locked(outputs: Path) -> None:
    child_read, child_write = os.pipe()
    end_read, end_write = os.pipe()

    def body() -> None:
        with Store(outputs).open_work(_KEY):
            worker = _fork(lambda: (os.read(end_read, 1), None)[1])
            os.write(child_write, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    parent = _fork(body)
    os.read(child_read, 20)
    assert _exit_code(parent) == -signal.SIGKILL

    with pytest.raises(LockedError), Store(outputs).open_work(_KEY):
        pass

    os.write(end_write, b"x")
    with Store(outputs).open_work(_KEY, wait=True) as work:
        assert work.resumed


def test_hold_when_a_waiter_takes_over_then_a_third_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    entered_read, entered_write = os.pipe()
    go_read, go_write = os.pipe()

    def body() -> None:
        os.read(go_read, 1)
        with lock.hold(path, "a", wait=True):
            os.write(entered_write, b"x")
            os.read(go_read, 1)

    pid = _fork(body)  # before the lock is held: a forked child would hold it too
    with lock.hold(path, "a"):
        os.write(go_write, b"x")
        time.sleep(0.2)  # the waiter has opened the file that is about to lose its name
    os.read(entered_read, 1)

    with pytest.raises(LockedError, match=f"process {pid}"), lock.hold(path, "a"):
        pass
    os.write(go_write, b"x")
    assert _exit_code(pid) == 0


def test_hold_when_a_forked_child_leaves_the_context_too_then_the_lock_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    try:
        with lock.hold(path, "a"):
            pid = os.fork()
            if pid == 0:
                raise KeyboardInterrupt
            os.waitpid(pid, 0)
            was_there = path.exists()
    except KeyboardInterrupt:
        os._exit(0)

    assert was_there
    assert not path.exists()


def test_hold_when_the_lock_file_is_a_link_then_is_refused_and_its_target_spared(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "a.lock").symlink_to(tmp_path / "outside")

    with pytest.raises(SecurityError), lock.hold(tmp_path / "a.lock", "a"):
        pass

    assert (tmp_path / "outside").read_text() == "precious"


def test_hold_when_the_folder_is_missing_then_says_that_the_lock_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"lock file .*a\.lock"), lock.hold(tmp_path / "no" / "a.lock", "a"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "null"])
def test_hold_when_the_holder_left_no_readable_name_then_the_error_still_comes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.lock"
    with lock.hold(path, "a"):
        path.write_text(content)
        with pytest.raises(LockedError, match="its lock is held"), lock.hold(path, "a"):
            pass


def test_interrupted_when_a_live_process_works_then_does_not_list_it(outputs: Path) -> None:
    pid, end = _hold_until_told(outputs)
    while_working = Store(outputs).interrupted("students")
    end()
    assert _exit_code(pid) == 0

    assert while_working == []
    assert [entry.id for entry in Store(outputs).interrupted("students")] == [_KEY.id]


def test_lock_when_shared_then_others_may_share_it_and_nobody_holds_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "workers.lock"
    with lock.share(path, "the work"):
        with lock.share(path, "the work"), pytest.raises(LockedError), lock.hold(path, "the work"):
            pass
        with pytest.raises(LockedError), lock.hold(path, "the work"):
            pass
    with lock.hold(path, "the work"), pytest.raises(LockedError), lock.share(path, "the work"):
        pass
    assert not path.exists()


def test_lock_when_a_process_that_shares_it_is_killed_then_can_be_held_alone(tmp_path: Path) -> None:
    path = tmp_path / "workers.lock"

    def body() -> None:
        with lock.share(path, "the work"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert _exit_code(_fork(body)) == -signal.SIGKILL
    with lock.hold(path, "the work"):
        pass
