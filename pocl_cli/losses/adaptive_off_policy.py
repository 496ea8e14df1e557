"""A skew divergence on a share of the student's own answers that follows the dev loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from pocl_cli.losses import evolving
from pocl_cli.losses.composition import AroundBase
from pocl_cli.losses.on_policy import Part, StudentAnswers, num_replayable
from pocl_cli.registry import kd_methods
from pocl_cli.seeds import derive_fraction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pocl_cli.losses.divergence import KDMethod
    from pocl_cli.losses.evolving import MethodState

_OF_BASE = "base."


@kd_methods.register("distillm")
@dataclass(frozen=True, kw_only=True)
class AdaptiveOffPolicy(AroundBase, StudentAnswers):
    """The divergence of `base`; a share φ of the steps uses answers of the student, new ones or those of a buffer.

    DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.2, as its released code has it. φ starts at `share_start`.
    A dev evaluation whose cross entropy is `tolerance` nats or more above that of the first evaluation, or of the one
    that raised φ last, raises φ by `share_step`, to 1 at most. One coin u a step, the same in all processes:
    u < φ·(1 − progress) or, while the buffer is not full, u < φ: the student answers the batch's prompts, and the
    answers enter the buffer, which keeps the newest `buffer_size`; else u < φ: as many answers as the batch has rows
    are drawn from the buffer without repetition; else the gold rows. On answers the loss is the divergence alone; on
    gold rows the stage's `kd_ratio` weighs it against cross entropy. With `share_start` and `share_step` 0 it is `base`
    itself. The rows of the batch count as consumed in a step on the buffer, too.
    Deviation: one buffer for all processes, where the code has one each. The dev loss is a mean over tokens, not over
    batches. The best state of a stage is handed on with the share and the buffer of the run.
    """

    needs_teacher: ClassVar[bool] = True
    share_start: Annotated[float, Field(ge=0, le=1)]
    share_step: Annotated[float, Field(ge=0, le=1)]
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    buffer_size: Annotated[int, Field(ge=1)]

    @property
    def generates(self) -> bool:
        return self.share_start > 0 or self.share_step > 0

    @property
    def needs_dev(self) -> bool:
        """Whether dev evaluations decide about the share."""
        return self.share_step > 0

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        coin, share = derive_fraction(seed, "student share", step), self._share(state)
        if coin >= share:
            return (Part("gold", kd_ratio),)
        if coin < share * (1 - progress) or num_replayable(state) < self.buffer_size:
            return (Part("generated", 1.0),)
        return (Part("replayed", 1.0),)

    def after_dev(self, figures: Mapping[str, float], state: MethodState) -> MethodState:
        import torch

        loss, share = figures["dev_cross_entropy"], self._share(state)
        if "dev_loss" in state:
            if loss < float(state["dev_loss"]) + self.tolerance:
                return state
            share = min(1.0, share + self.share_step)
        return {**state, "dev_loss": torch.tensor(loss), "student_share": torch.tensor(share)}

    def for_step(self, progress: float, state: MethodState) -> KDMethod:
        return evolving.for_step(self.base, progress, _of_base(state))

    def after_step(self, progress: float, state: MethodState, kd: Tensor) -> MethodState:
        of_base = evolving.after_step(self.base, progress, _of_base(state), kd)
        return {**state, **{f"{_OF_BASE}{name}": value for name, value in of_base.items()}}

    def shown(self, state: MethodState) -> dict[str, float]:
        return {"student_share": round(self._share(state), 6)}

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        divergence_N: Tensor = self.base(student_logprobs_NV, teacher_logprobs_NV)
        return divergence_N

    def _share(self, state: MethodState) -> float:
        return float(state["student_share"]) if "student_share" in state else self.share_start


def _of_base(state: MethodState) -> MethodState:
    return {name.removeprefix(_OF_BASE): value for name, value in state.items() if name.startswith(_OF_BASE)}
