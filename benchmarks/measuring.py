"""One measurement: a side's optimizer steps in a process that does nothing else."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import stored_states
from cases import KD_RATIO, Case, Setup
from pocl_cli.errors import ResourceError
from sides import SIDES

# At a learning rate of 0 the optimizer does all its work and every step has the same loss.
LR, WEIGHT_DECAY, GRAD_CLIP = 0.0, 0.01, 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What one process measures. `store` is the folder of the teacher's hidden states, for the stored side."""

    setup: Setup
    side: str
    method: str = "fkl"
    kd_ratio: float = KD_RATIO
    repeats: int = 3
    store: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """What one process measured. Times are medians over the repeats, per optimizer step.

    Attributes:
        seconds: wall time; `cpu_seconds` is that of all threads.
        peak_gb: 10⁹ bytes, of the whole life of the process: libraries and models included.
        loss: of the whole batch, in nats per response token; `gradient_norm` is the one before clipping.
    """

    seconds: float
    cpu_seconds: float
    peak_gb: float
    loss: float
    gradient_norm: float
    num_rows: int
    num_tokens: int
    num_response_tokens: int
    num_threads: int


def measure(job: Job) -> Measurement:
    """Makes one untimed step and then the timed ones, each with forward, backward, clipping and optimizer."""
    import torch

    case = Case(job.setup, method=job.method, kd_ratio=job.kd_ratio, store=job.store)
    step = optimizer_step(case, job.side)
    times = []
    for _ in range(job.repeats + 1):
        started = time.perf_counter(), time.process_time()
        loss, gradient_norm = step()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return Measurement(
        seconds=statistics.median(wall for wall, _ in times[1:]),
        cpu_seconds=statistics.median(cpu for _, cpu in times[1:]),
        peak_gb=peak_gb(resource.getrusage(resource.RUSAGE_SELF)),
        loss=loss,
        gradient_norm=gradient_norm,
        num_rows=len(case.rows),
        num_tokens=sum(row.num_tokens for row in case.rows),
        num_response_tokens=case.num_response_tokens,
        num_threads=torch.get_num_threads(),
    )


def optimizer_step(case: Case, side: str) -> Callable[[], tuple[float, float]]:
    """A whole optimizer step of `side`; it returns the loss and the gradient norm."""
    import torch

    from pocl_cli.training.optimizer import make_optimizer

    forward_and_backward = SIDES[side](case)
    model = case.student.model.train()
    optimizer = make_optimizer(model, lr=LR, weight_decay=WEIGHT_DECAY)

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        loss = forward_and_backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        return loss, float(gradient_norm)

    return step


def peak_gb(usage: resource.struct_rusage) -> float:
    """The peak memory in 10⁹ bytes. Linux counts in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def in_fresh_process(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a process of its own, so that the peak memory is its own; `what` names it in errors.

    Raises:
        ResourceError: the process died.
        PoclError: as the process raised it.
    """
    # The server imports the libraries once and forks itself for every measurement; off Linux, forking is not safe.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["pocl_cli.models.load", "transformers.models.llama.modeling_llama"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        why, fix = "it was probably out of memory", "take a smaller --model"
        raise ResourceError("the measuring process died", where=what, why=why, fix=fix) from error


@contextmanager
def filled_store(setup: Setup, *, needed: bool = True) -> Iterator[Path | None]:
    """A folder of the teacher's hidden states of the setup's rows, filled by another process; None if not needed."""
    if not needed:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process("filling the store", stored_states.fill, setup, Path(folder))
        yield Path(folder)
