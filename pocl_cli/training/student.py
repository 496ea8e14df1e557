"""The one module that training calls: the student's backbone and the objective in a single forward.

Wrapping this module for several processes shows the wrapper every use of every parameter, tied heads included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pocl_cli.training.objective import (
    ObjectiveOutput,
    distillation_loss,
    effective_kd_ratio,
    tokens_per_chunk,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pocl_cli.losses.divergence import KDMethod
    from pocl_cli.models.batch import Batch
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.models.teacher import Teacher


class StudentWithObjective(nn.Module):
    """Batch → loss. The teacher, where there is one, is asked inside and is not a part of the module."""

    def __init__(
        self,
        headed: HeadedModel,
        *,
        method: KDMethod,
        teacher: Teacher | None,
        num_real_tokens: int,
        hardware: Hardware,
    ) -> None:
        super().__init__()
        self.headed = headed
        self.method, self.teacher = method, teacher
        self.num_real_tokens, self.hardware = num_real_tokens, hardware
        self.chunk_tokens = tokens_per_chunk(headed.num_logits, hardware.objective_memory_mb, hardware.device)

    @property
    def backbone(self) -> PreTrainedModel:
        """The student as an ordinary model: what is saved."""
        return self.headed.model

    @property
    def packs(self) -> bool:
        """Whether both models read rows without padding, so that a micro-batch is as large as its rows together."""
        return self.headed.packs and (self.teacher is None or self.teacher.packs)

    def forward(
        self,
        batch: Batch,
        *,
        temperature: float,
        kd_ratio: float,
        normaliser: float,
        method: KDMethod | None = None,
        sampled: bool = False,
    ) -> ObjectiveOutput:
        """The loss of a batch under the step's temperature, ratio and, for one that evolves, method.

        `sampled` says that the responses are answers which this student has drawn.
        """
        batch = batch.to(self.hardware.device)
        method = self.method if method is None else method
        ratio = effective_kd_ratio(method, kd_ratio)
        with self.hardware.autocast():
            teacher_hidden_NE = self.teacher.hidden_states(batch) if ratio and self.teacher is not None else None
            return distillation_loss(
                self.headed.hidden_states(batch),
                self.headed.head,
                batch.targets_N,
                method=method,
                kd_ratio=kd_ratio,
                temperature=temperature,
                num_real_tokens=self.num_real_tokens,
                normaliser=normaliser,
                chunk_tokens=self.chunk_tokens,
                teacher_hidden_NE=teacher_hidden_NE,
                teacher_head=self.teacher.head if self.teacher is not None else None,
                answer_lengths=batch.response_lengths if sampled else None,
            )
