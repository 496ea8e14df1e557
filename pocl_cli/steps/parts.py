"""The parts of steps that several processes do together, by name: a job names one, and each process does its share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pocl_cli.errors import ConfigError
from pocl_cli.processes.controller import run_together
from pocl_cli.processes.job import Job
from pocl_cli.training.parallel import ALONE, Processes

if TYPE_CHECKING:
    from pocl_cli.artifacts.work import Work
    from pocl_cli.processes.outer import Outer
    from pocl_cli.schema import HardwareConfig
    from pocl_cli.steps.chain import Chain

# Given the chain, the work folder and the processes that do it, leaves files in the folder; what it gives back is JSON.
Part: TypeAlias = Callable[["Chain", Path, Processes], dict[str, Any]]

_PARTS = {
    "train": "pocl_cli.steps.train:train_student",
    "score_student": "pocl_cli.steps.score:score_student",
    "score_attention": "pocl_cli.steps.score:score_attention",
    "score_teacher": "pocl_cli.steps.score:score_teacher",
    "answers_of_student": "pocl_cli.steps.stored_answers:answers_of_student",
    "answers_of_teacher": "pocl_cli.steps.stored_answers:answers_of_teacher",
    "answer": "pocl_cli.steps.evaluate:answer",
}


def find_part(name: str) -> Part:
    module, _, function = _PARTS[name].partition(":")
    part: Part = getattr(importlib.import_module(module), function)
    return part


class Team(Protocol):
    """Processes that are there already, and do parts together with this one."""

    outer: Outer

    def do(self, job: Job) -> dict[str, Any]: ...


_team: Team | None = None


@contextmanager
def done_by(team: Team) -> Iterator[None]:
    """Within it, `do_part` starts no processes of its own."""
    global _team
    _team = team
    try:
        yield
    finally:
        _team = None


def do_part(name: str, chain: Chain, work: Work) -> dict[str, Any]:
    """Does a part of a step in as many processes as `hardware` says; what the first of them gives back.

    Raises:
        PoclError: the part failed; WorkerError where one of several processes died or hung.
        Interrupted: SIGTERM or SIGINT came, and what there was to save is saved.
    """
    hardware = chain.config.hardware
    if _team is not None:
        return _team.do(_job(name, chain, work, launched_hardware(hardware, _team.outer)))
    if hardware.num_nodes > 1:
        raise ConfigError(
            f"hardware.num_nodes={hardware.num_nodes}, and this command runs on one machine",
            why="pocl starts processes on its own machine only",
            fix=f"start it on every machine: torchrun --nnodes={hardware.num_nodes} … -m pocl_cli {chain.run.step} …",
        )
    if hardware.num_processes == 1:
        return find_part(name)(chain, work.path, ALONE)
    hardware = _with_threads(hardware)
    assert hardware.num_threads is not None, "the cores are shared out"
    return run_together(
        _job(name, chain, work, hardware),
        num_processes=hardware.num_processes,
        num_threads=hardware.num_threads,
        timeout_seconds=hardware.timeout_seconds,
    )


def launched_hardware(hardware: HardwareConfig, outer: Outer) -> HardwareConfig:
    """The section for processes that a launcher started: there are as many as it says."""
    parallel = "ddp" if hardware.parallel == "none" else hardware.parallel
    return _with_threads(hardware.model_copy(update={"num_processes": outer.local_size, "parallel": parallel}))


def _job(name: str, chain: Chain, work: Work, hardware: HardwareConfig) -> Job:
    return Job.of(name, chain.run, chain.made.model_copy(update={"hardware": hardware}), work.path)


def _with_threads(hardware: HardwareConfig) -> HardwareConfig:
    num_threads = hardware.num_threads or max(1, _num_cores() // hardware.num_processes)
    return hardware.model_copy(update={"num_threads": num_threads})


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
