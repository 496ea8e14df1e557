"""The processes that train one student together: who they are, and how what each of them has becomes one sum.

Every process holds the whole student and knows every global batch. It works on its share of one, then gradients are
summed, so all of them make the same optimizer step. Nothing but sums passes between processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from pocl_cli.errors import WorkerError

if TYPE_CHECKING:
    from pocl_cli.processes.outer import Outer

# Gradients are summed in groups of so many bytes: fewer calls than parameters, little memory beside the gradients.
BUCKET_BYTES = 2**25


class Processes:
    """One process by itself, for which there is nothing to sum and nobody to wait for.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.
        local_rank: which process of its machine this is, from 0.
    """

    rank = 0
    size = 1
    local_rank = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    @property
    def stream(self) -> tuple[int, ...]:
        """What sets this process's random streams apart; nothing in the first, which draws as one process does."""
        return (self.rank,) if self.rank else ()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`; the same bits in each. Raises WorkerError where one is gone."""
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes each gradient the sum of every process's. Raises WorkerError where a process is gone."""

    def barrier(self) -> None:
        """Waits until all processes are here. Raises WorkerError where one is gone."""

    def agree_on(self, what: str, *values: int) -> None:
        """Raises WorkerError where another process has other values."""


ALONE = Processes()


class ProcessGroup(Processes):
    """One of several processes, made by `join` or `join_launched`."""

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank, self.size, self.local_rank, self.device = rank, size, local_rank, device
        self._trained: list[nn.Parameter] | None = None

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self.device, copy=True)
        with _in_touch():
            dist.all_reduce(total)
        return total.to(values.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self._trained is None:
            self._trained = self._with_gradient(list(parameters))
        for parameter in self._trained:
            if parameter.grad is None:  # this process had no row
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in self._trained if parameter.grad is not None]):
            # The places in a bucket are the same in every step of every run: the order of additions may depend on them.
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with _in_touch():
                dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

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

    def _with_gradient(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters that have a gradient in any process: the others stay as they are, as with one process."""
        flags = self.sum(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        return [parameter for parameter, flag in zip(parameters, flags.tolist(), strict=True) if flag]


@contextmanager
def join(rank: int, size: int, folder: Path, *, device: torch.device, timeout_seconds: float) -> Iterator[ProcessGroup]:
    """Meets the other processes of this machine through a file in `folder`; nothing listens beyond loopback.

    Args:
        rank: of this process.
        size: how many processes come.
        folder: a private one, new for each meeting.
        device: of this process.
        timeout_seconds: how long to wait for another process, now and in every sum.

    Raises:
        WorkerError: a process does not come in time.
    """
    _bind_to_loopback()
    with _in_touch():
        store = FileStore(str(folder / "rendezvous"), size)
    with _grouped(store, rank, size, device, timeout_seconds):
        yield ProcessGroup(rank, size, rank, device)


class Board:
    """Short texts that every process of a launcher can write and read."""

    def __init__(self, store: Store) -> None:
        self._store = PrefixStore("pocl", store)

    def write(self, name: str, text: str) -> None:
        """Raises WorkerError where the process that keeps the board is gone."""
        with _in_touch():
            self._store.set(name, text)

    def read(self, name: str) -> str | None:
        """None where nothing has been written. Raises WorkerError where the process that keeps the board is gone."""
        with _in_touch():
            return self._store.get(name).decode() if self._store.check([name]) else None


@contextmanager
def join_launched(
    outer: Outer, *, device: torch.device, timeout_seconds: float
) -> Iterator[tuple[Board, ProcessGroup]]:
    """Meets the other processes that a launcher started, where it says (`MASTER_ADDR` and `MASTER_PORT`).

    Raises WorkerError where one does not come in time.
    """
    if outer.num_nodes == 1:
        _bind_to_loopback()
    os.environ.update(RANK=str(outer.rank), WORLD_SIZE=str(outer.size))
    os.environ.setdefault("MASTER_PORT", "29500")
    with _in_touch():
        meeting = rendezvous("env://", timeout=timedelta(seconds=timeout_seconds))
        store, rank, size = next(iter(meeting))
    with _grouped(PrefixStore("group", store), rank, size, device, timeout_seconds):
        yield Board(store), ProcessGroup(rank, size, outer.local_rank, device)


def _bind_to_loopback() -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)


@contextmanager
def _grouped(store: Store, rank: int, size: int, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _in_touch():
        store.set_timeout(timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield
    dist.destroy_process_group()


def num_processes() -> int:
    """How many processes train together with this one, itself among them."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _in_touch() -> Iterator[None]:
    """Around what needs the other processes: torch says by a RuntimeError that one is gone, or has not answered."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(
            "another worker process is gone or does not answer",
            why=str(error).split("\n", 1)[0],
            fix="the same command goes on from the last checkpoint",
        ) from error


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours together, up to `BUCKET_BYTES`; a larger one is by itself."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.nbytes for one in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
