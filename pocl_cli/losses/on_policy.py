"""KD methods that say what a step is made of: the gold rows, or answers to their prompts, stored or just written."""

# ruff: noqa: N815 (fields carry shape suffixes too)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import Field

from pocl_cli.schema import DecodingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pocl_cli.losses.divergence import KDMethod
    from pocl_cli.losses.evolving import MethodState


# In the state of a method with a replay buffer: the answers of earlier steps one after the other, where each starts
# (and the last one ends), and the place in the data set of the row whose prompt it answers. Oldest first.
REPLAY_TOKENS, REPLAY_STARTS, REPLAY_ROWS = "replay_tokens", "replay_starts", "replay_rows"


def num_replayable(state: MethodState) -> int:
    """How many answers the replay buffer holds."""
    return len(state[REPLAY_ROWS]) if REPLAY_ROWS in state else 0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step's loss: weight · [(1 − a)·ΣCE + a·T²·ΣD] / number of response tokens of its rows.

    Attributes:
        rows: `gold`, the rows of the global batch, or `generated`, their prompts with answers that the student writes
            before the step, or `teacher` and `student`, with the stored answers of that model, or `replayed`, answers
            of the student from earlier steps. Cross entropy belongs to what the student shall write: a part of its own
            answers has a = 1.
        kd_ratio: a.
        weight: of the part.
        method: whose divergence D is; None: that of the step.
    """

    rows: Literal["gold", "generated", "replayed", "teacher", "student"]
    kd_ratio: float
    weight: float = 1.0
    method: KDMethod | None = None


@runtime_checkable
class ChoosesRows(Protocol):
    """What a KD method has beside its divergence where a step is not made of the gold rows.

    It is pure: every process decides the same, and a run that resumes decides it again.
    """

    def rows_for_step(
        self, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
    ) -> tuple[Part, ...]:
        """The parts of a step.

        Args:
            seed: that of the training.
            step: number of optimizer steps before it, over all stages.
            progress: share of the run's optimizer steps that are done.
            state: that of the method.
            kd_ratio: the stage's weight of the distillation term on gold rows.
        """
        ...


@runtime_checkable
class OnPolicy(ChoosesRows, Protocol):
    """What it has besides where the student writes rows of its steps."""

    @property
    def generates(self) -> bool:
        """Whether any step has generated rows. Where not, nothing is asked for that only those need."""
        ...

    @property
    def decoding(self) -> DecodingConfig:
        """How the answers are drawn; the data set's limit on tokens holds besides."""
        ...


class SampledTokens(NamedTuple):
    """What both models give the N tokens of some generated answers, in nats; constants, without gradients.

    Attributes:
        student_N: log-probability of each token under the student, at the distillation temperature.
        teacher_N: under the teacher, at the same.
        drawn_N: under what the token was drawn from.
        lengths: number of tokens of each answer; they follow each other.
    """

    student_N: Tensor
    teacher_N: Tensor
    drawn_N: Tensor
    lengths: Sequence[int]


@runtime_checkable
class PolicyGradient(Protocol):
    """What a KD method has besides where a token of an answer counts by what came after it.

    To the divergence's gradient per token, c·∇ log q(token) is added, where c is a constant. Values stay as they are.
    """

    @property
    def sampling_temperature(self) -> float:
        """That of the answers."""
        ...

    @property
    def teacher_mix(self) -> float:
        """The teacher's share, 0..1, of the probabilities that every token of them is drawn by."""
        ...

    def policy_weights(self, tokens: SampledTokens) -> Tensor:
        """c of each token of generated rows `[N]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class StudentAnswers:
    """The keys of a method whose student answers prompts while it is trained: how its answers are drawn."""

    sampling_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]

    @property
    def decoding(self) -> DecodingConfig:
        return DecodingConfig(
            sampling_temperature=self.sampling_temperature,
            top_p=self.top_p,
            top_k=0,
            no_repeat_ngram_size=0,
            max_new_tokens=self.max_new_tokens,
        )


def rows_for_step(
    method: KDMethod, seed: int, step: int, progress: float, state: MethodState, kd_ratio: float
) -> tuple[Part, ...]:
    """The parts of a step: all of it on the gold rows where the method asks for nothing else."""
    if isinstance(method, ChoosesRows):
        return method.rows_for_step(seed, step, progress, state, kd_ratio)
    return (Part("gold", kd_ratio),)
