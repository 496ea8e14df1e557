"""The parts of steps that several processes do together, by name: a job names one, and each process does its share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pocl_cli.processes.controller import run_together
from pocl_cli.processes.job import Job
from pocl_cli.training.parallel import ALONE, Processes

if TYPE_CHECKING:
    from pocl_cli.artifacts.work import Work
    from pocl_cli.schema import HardwareConfig
    from pocl_cli.steps.chain import Chain

# Given the chain, the work folder and the processes that do it, leaves files in the folder; what it gives back is JSON.
Part: TypeAlias = Callable[["Chain", Path, Processes], dict[str, Any]]

_PARTS = {
    "train": "pocl_cli.steps.train:train_student",
    "score_student": "pocl_cli.steps.score:score_student",
    "score_teacher": "pocl_cli.steps.score:score_teacher",
    "answer": "pocl_cli.steps.evaluate:answer",
}


def find_part(name: str) -> Part:
    module, _, function = _PARTS[name].partition(":")
    part: Part = getattr(importlib.import_module(module), function)
    return part


def do_part(name: str, chain: Chain, work: Work) -> dict[str, Any]:
    """Does a part of a step in as many processes as `hardware` says; what the first of them gives back.

    Raises:
        PoclError: the part failed; WorkerError where one of several processes died or hung.
        Interrupted: SIGTERM or SIGINT came, and what there was to save is saved.
    """
    hardware = chain.config.hardware
    if hardware.num_processes == 1:
        return find_part(name)(chain, work.path, ALONE)
    num_threads = hardware.num_threads or max(1, _num_cores() // hardware.num_processes)
    config = chain.made.model_copy(update={"hardware": _with_threads(hardware, num_threads)})
    return run_together(
        Job.of(name, chain.run, config, work.path),
        num_processes=hardware.num_processes,
        num_threads=num_threads,
        timeout_seconds=hardware.timeout_seconds,
    )


def _with_threads(hardware: HardwareConfig, num_threads: int) -> HardwareConfig:
    return hardware.model_copy(update={"num_threads": num_threads})


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
