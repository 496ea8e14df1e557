"""The processes that train one student together: who they are, and how what each of them has becomes one sum.

Every process knows every global batch and works on its share of it, so all of them make the same optimizer step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from pocl_cli.errors import WorkerError
from pocl_cli.training.replica import Replica, SummedReplica
from pocl_cli.training.signals import JointSignals, Signals

if TYPE_CHECKING:
    from pocl_cli.processes.outer import Outer
    from pocl_cli.training.student import StudentWithObjective


class Processes:
    """One process by itself, for which there is nothing to sum and nobody to wait for.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.
        local_rank: which process of its machine this is, from 0.
        parallel: how they train together, as `hardware.parallel` names it.
    """

    rank = 0
    size = 1
    local_rank = 0
    parallel = "none"

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    @property
    def stream(self) -> tuple[int, ...]:
        """What sets this process's random streams apart; nothing in the first, which draws as one process does."""
        return (self.rank,) if self.rank else ()

    def replica(self, student: StudentWithObjective) -> Replica:
        """The student as this process trains it."""
        return Replica(student, self)

    def signals(self) -> Signals:
        """Catches signals as these processes heed them."""
        return Signals(catches=self.is_first)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`; the same bits in each. Raises WorkerError where one is gone."""
        return values

    def largest(self, value: int) -> int:
        """The largest `value` of any process; no device is waited for. Raises WorkerError where one is gone."""
        return value

    def barrier(self) -> None:
        """Waits until all processes are here. Raises WorkerError where one is gone."""

    def agree_on(self, what: str, *values: int) -> None:
        """Raises WorkerError where another process has other values."""


ALONE = Processes()


class ProcessGroup(Processes):
    """One of several processes, made by `join` or `join_launched`. Each holds the whole student and sums gradients."""

    parallel = "ddp"

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank, self.size, self.local_rank, self.device = rank, size, local_rank, device

    def replica(self, student: StudentWithObjective) -> Replica:
        return SummedReplica(student, self)

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self.device, copy=True)
        with in_touch():
            dist.all_reduce(total)
        return total.to(values.device)

    def largest(self, value: int) -> int:
        largest = torch.tensor(value)
        with in_touch():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        self.sum(torch.zeros(1)).item()

    def agree_on(self, what: str, *values: int) -> None:
        table = torch.zeros(self.size, len(values), dtype=torch.int64)
        table[self.rank] = torch.tensor(values)
        table = self.sum(table)
        if (table != table[0]).any():
            raise WorkerError(
                f"the processes disagree about {what}", why=f"they have {table.tolist()}", fix="run the command again"
            )


class ShardingGroup(ProcessGroup):
    """One of several processes of which each keeps a part of the student, its gradients and its optimizer's state."""

    parallel = "fsdp"

    def replica(self, student: StudentWithObjective) -> Replica:
        # Importing torch's fully_shard takes a second.
        from pocl_cli.training.sharded import ShardedReplica

        return ShardedReplica(student, self, self.device)

    def signals(self) -> Signals:
        # No process has the whole state by itself: all of them save it together.
        return JointSignals(catches=self.is_first, largest=self.largest)


_GROUPS = {kind.parallel: kind for kind in (ProcessGroup, ShardingGroup)}


@contextmanager
def join(
    rank: int, size: int, folder: Path, *, device: torch.device, timeout_seconds: float, parallel: str = "ddp"
) -> Iterator[ProcessGroup]:
    """Meets the other processes of this machine through a file in `folder`; nothing listens beyond loopback.

    Args:
        rank: of this process.
        size: how many processes come.
        folder: a private one, new for each meeting.
        device: of this process.
        timeout_seconds: how long to wait for another process, now and in every sum.
        parallel: `ddp` for the whole student in each, `fsdp` for a part of it in each.

    Raises:
        WorkerError: a process does not come in time.
    """
    _bind_to_loopback()
    with in_touch():
        store = FileStore(str(folder / "rendezvous"), size)
    with _grouped(store, rank, size, device, timeout_seconds):
        yield _GROUPS[parallel](rank, size, rank, device)


class Board:
    """Short texts that every process of a launcher can write and read."""

    def __init__(self, store: Store) -> None:
        self._store = PrefixStore("pocl", store)

    def write(self, name: str, text: str) -> None:
        """Raises WorkerError where the process that keeps the board is gone."""
        with in_touch():
            self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """None where nothing has been written. Raises WorkerError where the process that keeps the board is gone."""
        with in_touch():
            return self._store.get(name).decode() if self._store.check([name]) else None


@contextmanager
def join_launched(
    outer: Outer, *, device: torch.device, timeout_seconds: float, parallel: str = "ddp"
) -> Iterator[tuple[Board, ProcessGroup]]:
    """Meets the other processes that a launcher started, where it says (`MASTER_ADDR` and `MASTER_PORT`).

    Raises WorkerError where one does not come in time.
    """
    if outer.num_nodes == 1:
        _bind_to_loopback()
    os.environ.update(RANK=str(outer.rank), WORLD_SIZE=str(outer.size))
    os.environ.setdefault("MASTER_PORT", "29500")
    with in_touch():
        meeting = rendezvous("env://", timeout=timedelta(seconds=timeout_seconds))
        store, rank, size = next(iter(meeting))
    with _grouped(PrefixStore("group", store), rank, size, device, timeout_seconds):
        yield Board(store), _GROUPS[parallel](rank, size, outer.local_rank, device)


def _bind_to_loopback() -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)


@contextmanager
def _grouped(store: Store, rank: int, size: int, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with in_touch():
        store.set_timeout(timeout)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield
    dist.destroy_process_group()


@contextmanager
def in_touch(*, computes: bool = False) -> Iterator[None]:
    """Around what needs the other processes. Raises WorkerError where one is gone, or has not answered.

    Torch says so by a RuntimeError; where something is computed as well (`computes`), there are others too.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no error class of its own; its messages begin with the place in its source.
        if computes and not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise WorkerError(
            "another worker process is gone or does not answer",
            why=str(error).split("\n", 1)[0],
            fix="the same command goes on from the last checkpoint",
        ) from error
