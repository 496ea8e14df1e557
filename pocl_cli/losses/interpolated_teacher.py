"""Temporally adaptive interpolated distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pocl_cli.losses.divergence import LOG_ZERO, kl_divergence
from pocl_cli.registry import kd_methods

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.losses.evolving import MethodState


@dataclass(frozen=True)
class ForwardKLToInterpolation:
    """KL(p_t ‖ q) per response token, in nats: p_t ∝ q^(1−t)·p^t lies between student q and teacher p.

    p_t is the softmax of the logits (1 − t)·student + t·teacher; the student in it counts as a constant.
    """

    needs_teacher: ClassVar[bool] = True
    t: float | Tensor
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        # 0·(−inf) is NaN; a finite floor stands for the same probability, 0.
        student_NV = student_logprobs_NV.detach().clamp(min=LOG_ZERO)
        between_NV = (1 - self.t) * student_NV + self.t * teacher_logprobs_NV.clamp(min=LOG_ZERO)
        return kl_divergence(between_NV.log_softmax(dim=-1), student_logprobs_NV)


@kd_methods.register("taid")
@dataclass(frozen=True, kw_only=True)
class InterpolatedTeacher:
    """Forward KL to a teacher that moves from the student to the real teacher while t rises from `t_start` to `t_end`.

    TAID, Shing et al. 2025, arXiv 2501.16937, section 3. `schedule`:

    * `linear`: t = t_start + (t_end − t_start)·progress, over all optimizer steps of the run.
    * `adaptive`: after every step t rises by rate·σ(m)·(1 − t), where m is the moving average, with `momentum` of its
      past, of the relative fall of the loss from one step to the next; never below the linear schedule, never above
      `t_end`. The loss is the divergence itself, without T² and without cross entropy.

    Called by itself, outside a run, it is the divergence at `t_start`.
    Deviation: the run's best state of a stage is handed on with the t of the run, not with the t it was reached at.
    """

    needs_teacher: ClassVar[bool] = True
    schedule: Literal["linear", "adaptive"]
    t_start: Annotated[float, Field(ge=0, le=1)]
    t_end: Annotated[float, Field(ge=0, le=1)]
    rate: Annotated[float, Field(ge=0, le=1)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    t_squared: bool

    def __post_init__(self) -> None:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start ({self.t_start}) must not be above t_end ({self.t_end})")

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        return self.for_step(0.0, {})(student_logprobs_NV, teacher_logprobs_NV)

    def for_step(self, progress: float, state: MethodState) -> ForwardKLToInterpolation:
        t = state["t"] if "t" in state else self._linear(progress)
        return ForwardKLToInterpolation(t, self.t_squared)

    def after_step(self, progress: float, state: MethodState, kd: Tensor) -> MethodState:
        if self.schedule == "linear":
            return state
        if not state:
            return {"t": kd.new_tensor(self.t_start), "average_fall": kd.new_zeros(()), "loss": kd}
        fall = (state["loss"] - kd) / (state["loss"] + 1e-15)
        average_fall = self.momentum * state["average_fall"] + (1 - self.momentum) * fall
        risen = state["t"] + self.rate * average_fall.sigmoid() * (1 - state["t"])
        t = risen.clamp(min=self._linear(progress)).clamp(max=self.t_end)
        return {"t": t, "average_fall": average_fall, "loss": kd}

    def _linear(self, progress: float) -> float:
        return self.t_start + (self.t_end - self.t_start) * progress
