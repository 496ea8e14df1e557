"""The student with its objective under DistributedDataParallel and fully_shard: loss and gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pocl_cli.records import TokenisedRow
from pocl_cli.training.objective import collate
from pocl_cli.training.parallel import Processes
from pocl_cli.training.student import StudentWithObjective

from ..support.processes import in_processes
from ..support.training import make_student, toy_rows

TEMPERATURE, KD_RATIO = 2.0, 0.7
ROWS = toy_rows(6)
NUM_TOKENS = sum(len(row.response_ids) for row in ROWS)
# Process 1 has one row of the six, or none: then a row without a response keeps it in step with the other.
NO_ROW = TokenisedRow("none", ROWS[0].prompt_ids, [])
SHARES = {"uneven": (ROWS[:5], ROWS[5:]), "one without a row": (ROWS, [NO_ROW])}


def in_ddp(student: StudentWithObjective) -> nn.Module:
    return DistributedDataParallel(student)


def in_fsdp(student: StudentWithObjective) -> nn.Module:
    for block in student.backbone.transformer.h:
        fully_shard(block)
    fully_shard(student)
    return student


def step(module: nn.Module, rows: Any, normaliser: float) -> Tensor:
    output = module(collate(rows), temperature=TEMPERATURE, kd_ratio=KD_RATIO, normaliser=normaliser)
    output.loss.backward()
    loss: Tensor = output.loss.detach()
    return loss


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("wrap", "method"), [(in_ddp, "jsd"), (in_fsdp, "jsd"), (in_fsdp, "sft")])
def test_student_wrapped_for_two_processes_has_the_loss_and_gradients_of_one(
    tmp_path: Path, wrap: Any, method: str, shares: str
) -> None:
    def make() -> StudentWithObjective:
        return make_student(method, dtype=torch.float64, memory_mb=0.11)

    alone = make()
    loss_alone = step(alone, ROWS, NUM_TOKENS)

    def act(processes: Processes) -> None:
        student = make()
        # The wrappers average gradients over the processes; the loss is a sum divided by the tokens of all.
        loss = step(wrap(student), SHARES[shares][processes.rank], NUM_TOKENS / 2)

        assert processes.sum(loss).item() / 2 == pytest.approx(loss_alone.item(), rel=1e-12)
        for (name, parameter), expected in zip(student.named_parameters(), alone.parameters(), strict=True):
            assert parameter.grad is not None
            assert expected.grad is not None
            torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-9, atol=1e-14, msg=name)

    in_processes(2, tmp_path, act)
