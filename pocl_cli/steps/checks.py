"""What can be known before any weights are read and would stop a step: looked at first, and shown by `plan=true`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pocl_cli.artifacts.disk import check_free_disk, free_bytes
from pocl_cli.errors import PoclError, ResourceError
from pocl_cli.log import get_logger
from pocl_cli.models.device import memory_of, set_up_hardware
from pocl_cli.models.load import check_context, context_length, load_tokenizer, read_config
from pocl_cli.models.lora import require_peft
from pocl_cli.models.vocabulary import check_width, compare_tokenizers, num_real_tokens
from pocl_cli.records import answers_of
from pocl_cli.steps.costs import Bytes, Sizes, gib, measuring_memory, sizes_of, training_disk, training_memory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from pocl_cli.models.source import ModelSource
    from pocl_cli.schema import DatasetConfig, LoraConfig, PoclConfig
    from pocl_cli.steps.chain import Chain


@dataclass(frozen=True)
class Finding:
    """What was found, for people; `warns` where the step may fail later on."""

    text: str
    warns: bool = False


@dataclass(frozen=True)
class Check:
    """`look` says what was found, or raises the PoclError that stops the step."""

    name: str
    look: Callable[[], Finding]


def refuse_early(checks: Iterable[Check]) -> None:
    """Looks at everything in order; warnings are logged. Raises the first PoclError."""
    for check in checks:
        finding = check.look()
        if finding.warns:
            get_logger().warning("%s: %s", check.name, finding.text)


def verdicts(checks: Iterable[Check]) -> list[tuple[str, str, str]]:
    """Name, verdict (`ok`, `warning`, `would refuse`) and finding of every check: refuses nothing."""
    rows = []
    for check in checks:
        try:
            finding = check.look()
            rows.append((check.name, "warning" if finding.warns else "ok", finding.text))
        except PoclError as error:
            rows.append((check.name, "would refuse", str(error)))
    return rows


# ── the checks of a step ──────────────────────────────────────────────────────────────────────────────────────────────


def of_training(chain: Chain) -> list[Check]:
    """For `distill`."""
    needed = chain.config.dataset.max_tokens
    student = _student(chain)
    teachers = [
        _teacher(one, f"teacher {one.config.teacher.name}" if chain.lessons else "teacher") for one in chain.taught
    ]
    checks = [*student.checks(), student.context(needed)]
    if chain.config.student.lora.rank:
        checks.append(Check("student: adapters", _adapters_can_be_made))
    for teacher in teachers:
        checks += [*teacher.checks(), teacher.context(needed), _same_tokenizer(teacher, student)]

    def memory() -> Bytes:
        running = [teacher.sizes for teacher, one in zip(teachers, chain.taught, strict=True) if not one.stores_teacher]
        beside = max(running, key=lambda sizes: sizes.weights, default=None)
        section = chain.config.hardware
        return training_memory(student.sizes, beside, set_up_hardware(section), section.num_parts)

    return [
        *checks,
        Check("memory", lambda: _memory(chain, memory())),
        Check("disk", lambda: _disk(chain, training_disk(student.sizes))),
    ]


def of_measuring(chain: Chain, who: str) -> list[Check]:
    """For `score`, of one measured model."""
    student = _student(chain)
    measured = _teacher(chain) if who == "teacher" else student
    checks = [*measured.checks(), measured.context(_measured_tokens(chain.config, who))]
    if who == "teacher":
        checks.append(_same_tokenizer(measured, student))
    return [*checks, _measuring_memory(chain, measured)]


def of_answering(chain: Chain, who: str) -> list[Check]:
    """For the stored answers of a model."""
    return [*_answering(chain, who), _measuring_memory(chain, _student(chain) if who == "student" else _teacher(chain))]


def _answering(chain: Chain, who: str) -> list[Check]:
    student, needed = _student(chain), chain.config.dataset.max_tokens
    if who == "student":
        return [*student.checks(), student.context(needed)]
    teacher = _teacher(chain)
    return [*teacher.checks(), teacher.context(needed), _same_tokenizer(teacher, student)]


def of_evaluation(chain: Chain, source: ModelSource) -> list[Check]:
    """For `evaluate`, of the model in `source`."""
    model = _Model("model", lambda: source)
    return [*model.checks(), *_evaluated_contexts(chain.config, model), _measuring_memory(chain, model)]


def of_plan(chain: Chain) -> list[Check]:
    """For `plan=true`: those of training, and what scoring and evaluation would ask of the same student besides."""
    student = _student(chain)
    checks = of_training(chain)
    if "teacher" in answers_of(chain.config.kd_method) and not chain.config.kd_method.needs_teacher:
        checks += _answering(chain, "teacher")
    if chain.config.curriculum.needs_partition and chain.config.difficulty.needs:
        checks.append(student.context(_measured_tokens(chain.config, "student"), "score"))
    if chain.config.evaluation.predictions is None:
        checks += _evaluated_contexts(chain.config, student)
    return checks


def _measured_tokens(config: PoclConfig, who: str) -> int:
    return _longest(config.dataset, config.score.max_new_tokens if who == "student" else 0)


def _longest(dataset: DatasetConfig, new_tokens: int) -> int:
    """The most tokens that a model reads of a row, or of its prompt and an answer of so many new tokens."""
    if not dataset.has_prompts:
        return dataset.max_tokens
    return max(dataset.max_tokens, dataset.max_prompt_tokens + new_tokens)


def _evaluated_contexts(config: PoclConfig, model: _Model) -> list[Check]:
    new_tokens = config.evaluation.decoding.max_new_tokens
    return [model.context(_longest(one, new_tokens), f"evaluate {one.name}") for one in config.evaluation.datasets]


def _adapters_can_be_made() -> Finding:
    require_peft()
    return Finding("peft is installed")


# ── a model, by its configuration and tokenizer ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Model:
    """What is known of a model without its weights, each looked up when it is first asked for."""

    role: str
    resolve: Callable[[], ModelSource]
    lora: LoraConfig | None = None

    @cached_property
    def source(self) -> ModelSource:
        return self.resolve()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return read_config(self.source)

    @cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.source, self.lora)

    def checks(self) -> list[Check]:
        return [
            Check(f"{self.role}: tokenizer", self._tokens_known),
            Check(f"{self.role}: vocabulary", self._vocabulary_fits),
        ]

    def context(self, needed: int, what: str | None = None) -> Check:
        """Whether `needed` tokens fit; `what` names the step where it is another one."""

        def look() -> Finding:
            check_context(self.config, needed)
            bound = context_length(self.config)
            return Finding(f"{needed} tokens fit into {bound} positions" if bound else "nothing bounds it")

        return Check(f"{what}: context" if what else f"{self.role}: context", look)

    def _tokens_known(self) -> Finding:
        end, padding = self.tokenizer.eos_token, self.tokenizer.pad_token
        # What is padding is told by lengths, so that EOS may stand for it.
        return Finding(f"EOS is {end!r}, padding {'the same' if padding == end else repr(padding)}")

    def _vocabulary_fits(self) -> Finding:
        count, width = num_real_tokens(self.tokenizer), int(self.config.get_text_config(decoder=True).vocab_size)
        check_width(self.role, width, count)
        return Finding(f"{count:,} tokens, {width:,} rows")


def _student(chain: Chain) -> _Model:
    return _Model("student", lambda: chain.student, chain.config.student.lora)


def _teacher(chain: Chain, role: str = "teacher") -> _Model:
    def resolve() -> ModelSource:
        assert chain.teacher is not None, "configuration refuses a method that needs a teacher and has none"
        return chain.teacher

    return _Model(role, resolve)


def _same_tokenizer(teacher: _Model, student: _Model) -> Check:
    def look() -> Finding:
        count = compare_tokenizers(teacher.tokenizer, student.tokenizer)
        return Finding(f"both share {count:,} tokens")

    return Check(f"{teacher.role} and {student.role}: tokenizers", look)


# ── the machine ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _measuring_memory(chain: Chain, model: _Model) -> Check:
    return Check(
        "memory", lambda: _memory(chain, measuring_memory(model.sizes, set_up_hardware(chain.config.hardware)))
    )


def _memory(chain: Chain, needed: Bytes) -> Finding:
    """Raises ResourceError where weights, gradients and moments alone are more than there is; free memory may grow."""
    device, num_processes = set_up_hardware(chain.config.hardware).device, chain.config.hardware.num_processes
    memory = memory_of(device, alone=num_processes == 1)
    if device.type != "cuda":  # each process has its own copy, all of them in one memory
        needed = Bytes(*(num_processes * count for count in needed))
    if needed.least > memory.total:
        raise ResourceError(
            f"not enough memory on {device}",
            why=f"the models take at least {gib(needed.least)} and there are {gib(memory.total)}",
            fix="use smaller models, teacher.store=true, or a larger device (hardware.device)",
        )
    return Finding(
        f"about {gib(needed.estimate)} are needed, {gib(memory.free)} are free on {device}",
        warns=needed.estimate > memory.free,
    )


def _disk(chain: Chain, needed: Bytes) -> Finding:
    outputs = chain.store.outputs
    check_free_disk(outputs, needed.least, "a checkpoint and the student")
    free = free_bytes(outputs)
    return Finding(f"about {gib(needed.estimate)} are needed, {gib(free)} are free", warns=needed.estimate > free)
