"""Processes that die on purpose."""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pocl_cli import faults
from pocl_cli.training.parallel import Processes, join

from .stacks import end_and_show_stacks

_meetings = itertools.count()


def forked(action: Callable[[], object]) -> int:
    """Runs `action` in a child process that shares the imports of this one; 0 or the signal that it died of."""
    if torch.cuda.is_available():
        pytest.skip("a process that has used autograd beside a GPU cannot fork")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, f"the child failed with {os.WEXITSTATUS(status)}"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die() -> None:
    """As a power cut is to this process: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_operation(n: int) -> None:
    """Lets this process die at its n-th file operation (from 1)."""
    faults.hook = faults.fault(f"kill:file:{n}")


def in_processes(
    size: int,
    folder: Path,
    action: Callable[[Processes], object],
    *,
    timeout_seconds: float = 30,
    parallel: str = "ddp",
) -> None:
    """Runs `action` in `size` forked processes that train together; all must come to its end."""
    if torch.cuda.is_available():
        pytest.skip("a process that has used autograd beside a GPU cannot fork")
    meeting = folder / f"meeting-{next(_meetings)}"
    meeting.mkdir(parents=True)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            faulthandler.enable(2)
            try:
                device = torch.device("cpu")
                with join(
                    rank, size, meeting, device=device, timeout_seconds=timeout_seconds, parallel=parallel
                ) as joined:
                    action(joined)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = _exit_codes(pids, timeout_seconds=4 * timeout_seconds)
    assert codes == [0] * size


def _exit_codes(pids: list[int], *, timeout_seconds: float) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        hung = set(pids) - set(codes)
        if hung and time.monotonic() > deadline:
            end_and_show_stacks(hung)
            raise AssertionError(f"{len(hung)} of {len(pids)} processes hung; their stacks are above")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]
