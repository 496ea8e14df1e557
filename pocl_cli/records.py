"""The values that travel between the steps. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

# Before the name of a column of scores that is the teacher's.
TEACHER = "teacher_"
# The column of scores that is measured apart, when a difficulty first reads it: it takes a pass of its own.
ATTENTION = "attention_variance"

_BEGINNING_CHARS = 200


@dataclass(frozen=True, slots=True)
class Record:
    """One row. `id` is a hash of its content; the k-th identical copy (k ≥ 2) ends in `-k`.

    A row with several references trains on the first and is scored against the best.

    Attributes:
        instruction: empty for plain text, whose document is the one reference; of a conversation the last turn.
        turns: of a conversation, role and text of all that comes before the response.
        where: of a conversation, the file and line: its tokenizer's template may refuse it.
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    category: str | None = None
    turns: tuple[tuple[str, str], ...] | None = None
    where: str | None = None

    @property
    def response(self) -> str:
        """The response that the row trains on."""
        return self.references[0]

    @property
    def beginning(self) -> str:
        """The first 200 characters of the instruction, or of plain text: what files and tables show of the row."""
        text = self.instruction if self.instruction or self.input else self.response
        return text[:_BEGINNING_CHARS]


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that is not used, with the reason; `location` is where a person finds it ("rows.jsonl:17")."""

    location: str
    reason: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """Token ids of a record. `response_ids` ends with EOS unless `response_cut`; `prompt_cut`: it was shortened.

    A long document of plain text is several rows, the k-th (k ≥ 2) with `.k` behind the record's id.
    """

    id: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    prompt_cut: bool = False
    response_cut: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def piece_id(record_id: str, number: int) -> str:
    """The id of the row that is piece `number` (from 1) of a record."""
    return record_id if number == 1 else f"{record_id}.{number}"


def record_of(row_id: str) -> str:
    """The id of the record that a row is from."""
    return row_id.partition(".")[0]


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """One model on one row: `cross_entropy` in nats per response token, `rouge_l` F1 in 0..1 where it generated.

    `cross_entropy_alone` is that of the response without its prompt, after the token that begins a text; the student's.
    """

    id: str
    num_prompt_tokens: int
    num_response_tokens: int
    cross_entropy: float
    generation: str | None = None
    rouge_l: float | None = None
    cross_entropy_alone: float | None = None


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """The student's attention on one row: the variance of its weights (`models.attention_weights`)."""

    id: str
    num_prompt_tokens: int
    num_response_tokens: int
    attention_variance: float


def measured_by(column: str) -> str:
    """Whose scores a column that a difficulty reads is in: `student`, `attention` (the student's) or `teacher`."""
    if column == ATTENTION:
        return "attention"
    return "teacher" if column.startswith(TEACHER) else "student"


def reads_teacher(columns: Iterable[str]) -> bool:
    """Whether the teacher's scores are among the columns that a difficulty reads."""
    return "teacher" in map(measured_by, columns)


@dataclass(frozen=True, kw_only=True)
class AnswerDecoding:
    """How the answers are drawn that a KD method trains on; a row with its answer never exceeds `dataset.max_tokens`.

    Attributes:
        sampling_temperature: 0 is greedy.
        top_p: nucleus sampling: the smallest set of tokens with this probability.
        max_new_tokens: length limit of an answer.
        no_repeat_ngram_size: no n-gram of this size twice in prompt and answer; 0 turns the rule off.
        seed: of the draws.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    sampling_temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    no_repeat_ngram_size: Annotated[int, Field(ge=0)]
    seed: int


def answers_of(method: object) -> tuple[str, ...]:
    """The models (`student`, `teacher`) whose stored answers to the training rows a KD method trains on."""
    named: Iterable[str] = getattr(method, "answers_of", ())
    return tuple(sorted(named))


def asks_teacher(method: Any) -> bool:
    """Whether a KD method needs a teacher, in training or for its answers."""
    return bool(method.needs_teacher) or "teacher" in answers_of(method)


def generates(method: object) -> bool:
    """Whether the student answers prompts while a KD method trains it; most methods know of no such thing."""
    return bool(getattr(method, "generates", False))


@dataclass(frozen=True, slots=True)
class Subset:
    """One slice of the partition, easiest first inside it."""

    index: int
    record_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """When a stage ends before its last epoch: once its dev evaluations do not improve any more.

    Attributes:
        metric: the figure that is watched, ROUGE-L for its highest and cross entropy for its lowest value; None: never.
        patience: evaluations in a row without an improvement in the stage.
        min_epochs: epochs that are made in any case.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    metric: Literal["dev_rouge_l", "dev_cross_entropy"] | None
    patience: Annotated[int, Field(ge=1)]
    min_epochs: Annotated[int, Field(ge=1)]


def may_end_early(scheduler: object) -> bool:
    """Whether stages may end by a rule; a scheduler of a plugin need not know of any."""
    rule: Convergence | None = getattr(scheduler, "convergence", None)
    return rule is not None and rule.metric is not None


@dataclass(frozen=True, slots=True)
class Stage:
    """What is trained on at one temperature and kd_ratio.

    Attributes:
        index: counted from 0.
        record_ids: its rows.
        epochs: passes over them.
        temperature: of the distillation.
        kd_ratio: weight of the distillation term.
        times: how often the stage sees each row in all, epochs × rows together; None: once an epoch.
        restart_optimizer: it starts with fresh moments (the first stage always does).
        restart_lr: it starts the learning-rate schedule afresh (the first stage always does).
        convergence: a rule by which it may end before its last epoch.
    """

    index: int
    record_ids: tuple[str, ...]
    epochs: int
    temperature: float
    kd_ratio: float
    times: tuple[int, ...] | None = None
    restart_optimizer: bool = True
    restart_lr: bool = True
    convergence: Convergence | None = None
