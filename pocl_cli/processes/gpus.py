"""Which GPUs a job of a sweep sees, where several jobs run on one machine at once."""

from __future__ import annotations

import os
from collections.abc import Sequence

_VISIBLE, _TAKEN = "CUDA_VISIBLE_DEVICES", "POCL_GPUS_TAKEN"


def gpus_of_job(number: int, gpus: Sequence[str], num_processes: int) -> list[str]:
    """The GPUs of job `number` (from 0), one a process: the jobs take turns over as many groups as there are GPUs for.

    All of them where there are fewer than one job needs, so that the job itself says what it lacks.
    """
    num_groups = len(gpus) // num_processes
    if num_groups == 0:
        return list(gpus)
    first = number % num_groups * num_processes
    return list(gpus[first : first + num_processes])


def take_gpus(number: int, num_processes: int) -> None:
    """Lets this process see the GPUs of a job and no others; those of its first job, where it runs one after another.

    A process that has used a GPU cannot be moved to another one, and while it has its own no other job takes it.
    """
    if _TAKEN in os.environ:
        return
    import torch

    count = torch.cuda.device_count()
    gpus = os.environ.get(_VISIBLE, "").split(",") if os.environ.get(_VISIBLE) else [str(n) for n in range(count)]
    if count:
        os.environ[_VISIBLE] = os.environ[_TAKEN] = ",".join(gpus_of_job(number, gpus, num_processes))
