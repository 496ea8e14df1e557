"""Keeps a step that is not finite away from the weights, without waiting for the device after every step."""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_cli import faults
from pocl_cli.errors import NonFiniteError
from pocl_cli.records import Stage
from pocl_cli.training.sampler import Sampler


class FiniteGuard:
    """From the first step on whose loss or gradient norm is not finite, the optimizer changes nothing.

    The flag stays on the device, where the fused optimizer reads it; `refuse` looks at it and names the step.

    Args:
        stage: the stage of the optimizer.
        sampler: of that stage, for the ids of the rows.
        optimizer: a fused one.
        first_step: the run's number of the stage's step 0, plus one.
    """

    def __init__(self, stage: Stage, sampler: Sampler, optimizer: torch.optim.Optimizer, *, first_step: int) -> None:
        self.stage, self.sampler, self.optimizer, self.first_step = stage, sampler, optimizer, first_step
        device = optimizer.param_groups[0]["params"][0].device
        # What optimizers of torch know from automatic loss scaling: 1 means, leave everything as it is.
        self.found = torch.zeros((), device=device)
        self.optimizer.found_inf = self.found  # type: ignore[attr-defined]
        self._bad = torch.stack([self.found - 1, self.found, self.found])  # stage step, loss, gradient norm

    def step(self, stage_step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Makes the optimizer's step of the gradients as they are, unless this or an earlier one is not finite."""
        now = torch.stack([torch.full_like(self.found, stage_step), loss.to(self.found), grad_norm.to(self.found)])
        first = now.isfinite().all().logical_not() & (self.found == 0)
        self._bad = torch.where(first, now, self._bad)
        self.found.copy_(torch.maximum(self.found, first.to(self.found)))
        self.optimizer.step()
        faults.reached("step", f"{self.first_step + stage_step}")

    def refuse(self) -> None:
        """Waits for the device. Raises NonFiniteError where a step was not made."""
        stage_step, loss, grad_norm = self._bad.tolist()
        if stage_step < 0:
            return
        name, value = ("gradient norm", grad_norm) if torch.tensor(loss).isfinite() else ("loss", loss)
        record_ids = self.sampler.global_batch(int(stage_step))
        raise NonFiniteError(
            f"the {name} is {value}",
            where=f"stage {self.stage.index}, step {self.first_step + int(stage_step)}",
            why=f"the records of the batch are {', '.join(record_ids)}; the step was not made",
            fix="lower train.lr, use hardware.precision=float32, or remove the rows; earlier checkpoints are kept",
        )
