"""The student with its objective under DistributedDataParallel and fully_shard: loss and gradients of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pocl_cli.training.objective import collate

from ..support.training import make_student, toy_rows

TEMPERATURE, KD_RATIO = 2.0, 0.7
ROWS = toy_rows(6)
# Process 1 has one row of the six, or none: then a row without a response keeps it in step with the other.
SHARES = {"uneven": ([0, 1, 2, 3, 4], [5]), "one without a row": ([0, 1, 2, 3, 4, 5], [])}


def step(module: torch.nn.Module, rows: list[int], normaliser: float) -> torch.Tensor:
    from pocl_cli.records import TokenisedRow

    batch = [ROWS[number] for number in rows] or [TokenisedRow("none", ROWS[0].prompt_ids, [])]
    output = module(collate(batch), temperature=TEMPERATURE, kd_ratio=KD_RATIO, normaliser=normaliser)
    output.loss.backward()
    return output.loss.detach()


def worker(rank: int, folder: Path, wrapper: str, method: str, shares: str) -> None:
    """One of two processes; the first writes what both found."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    student = make_student(method, dtype=torch.float64, memory_mb=0.11)
    module: torch.nn.Module = student
    if wrapper == "ddp":
        module = DistributedDataParallel(student)
    else:
        for block in student.backbone.transformer.h:
            fully_shard(block)
        fully_shard(student)
    # The wrappers average gradients over the processes; the loss is a sum divided by the tokens of all.
    loss = step(module, SHARES[shares][rank], sum(len(row.response_ids) for row in ROWS) / 2)
    dist.all_reduce(loss)
    gradients = {}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        gradients[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).flatten().tolist()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps({"loss": loss.item() / 2, "gradients": gradients}))
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tested on Linux")
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("wrapper", "method"), [("ddp", "jsd"), ("fsdp", "jsd"), ("fsdp", "sft")])
def test_student_wrapped_for_two_processes_has_the_loss_and_gradients_of_one(tmp_path, wrapper, method, shares):
    command = [sys.executable, "-m", "tests.integration.test_wrapped_student"]
    arguments = (str(tmp_path), wrapper, method, shares)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen([*command, str(rank), *arguments], cwd=Path(__file__).parents[2], env=environment)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())

    alone = make_student(method, dtype=torch.float64, memory_mb=0.11)
    loss = step(alone, list(range(len(ROWS))), sum(len(row.response_ids) for row in ROWS))

    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in alone.named_parameters():
        assert found["gradients"][name] == pytest.approx(parameter.grad.flatten().tolist(), rel=1e-9, abs=1e-14), name


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
