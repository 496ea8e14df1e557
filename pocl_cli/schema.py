"""The configuration that every step receives: one frozen model per section, checked before torch is imported."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pocl_cli.errors import nearest


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError("devices are auto, cpu, mps, cuda and cuda:N")
    return device


def _plain_name(name: str) -> str:
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("a name has no slash, backslash or control character, and is neither '.' nor '..'")
    return name


Device = Annotated[str, AfterValidator(_known_device)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Members of the open families: configuration builds them through their registries before this schema is checked.
KDMethod: TypeAlias = Any
Scheduler: TypeAlias = Any
DifficultyMeasurer: TypeAlias = Any
Tracker: TypeAlias = Any


class ModelConfig(Section):
    """Where a model comes from: `path` (hub id, folder, student artifact) or `experiment`, the recipe that makes it.

    `allow_pickle`: where its weights are pickled only, read them once, tensors only, and keep them as safetensors.
    """

    name: str
    path: str | None
    experiment: str | None
    overrides: tuple[str, ...]
    revision: str | None
    dtype: Dtype
    allow_pickle: bool

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None and self.experiment is not None:
            raise ValueError("path and experiment are both set; a model has one source: set the other to null")
        if self.overrides and self.experiment is None:
            raise ValueError("overrides apply to the recipe that experiment names, and experiment is null")
        return self


class TeacherConfig(ModelConfig):
    """`store`: keep the teacher's hidden states on disk instead of running the teacher in every step."""

    store: bool

    @property
    def present(self) -> bool:
        """False for `teacher=none`."""
        return self.path is not None or self.experiment is not None


class LoraConfig(Section):
    """Low-rank adapters that are trained in place of all weights; `rank` null or 0: none."""

    rank: Annotated[int, Field(ge=0)] | None
    alpha: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None


class StudentConfig(ModelConfig):
    """The model that is trained. `architecture` (with `tokenizer` and `init_seed`) makes one from nothing."""

    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None
    architecture: dict[str, str | int | float | bool | None] | None
    tokenizer: str | None
    init_seed: int
    dropout: Annotated[float, Field(ge=0, lt=1)] | None
    gradient_checkpointing: bool
    lora: LoraConfig

    @model_validator(mode="after")
    def _has_source(self) -> StudentConfig:
        sources = [self.path, self.experiment, self.architecture]
        if sum(source is not None for source in sources) > 1 and self.architecture is not None:
            raise ValueError("architecture makes a new model; set path and experiment to null, or architecture to null")
        if all(source is None for source in sources):
            raise ValueError("a student needs one of path, experiment or architecture")
        if self.architecture is not None:
            if self.tokenizer is None:
                raise ValueError(
                    "an architecture made from nothing needs student.tokenizer ('toy', a hub id or a folder)"
                )
            if "model_type" not in self.architecture:
                raise ValueError("architecture needs model_type (llama, gpt2, qwen2, …)")
        elif self.tokenizer is not None:
            raise ValueError("tokenizer goes with architecture only; a model from path brings its own")
        return self


class FieldsConfig(Section):
    """Names of the columns in the source; null means: recognise the usual other names."""

    instruction: str | None
    input: str | None
    output: str | None
    category: str | None


class DatasetConfig(Section):
    name: Annotated[str, Field(min_length=1), AfterValidator(_plain_name)]
    path: str | None
    split: str | None
    data_files: str | None
    revision: str | None
    generator: str | None
    num_rows: Annotated[int, Field(ge=1)] | None
    format: Literal["instruction", "text", "messages"]
    fields: FieldsConfig
    limit: Annotated[int, Field(ge=1)] | None
    dev_size: Annotated[int, Field(ge=0)]
    seed: int
    max_tokens: Annotated[int, Field(ge=2)]
    max_prompt_tokens: Annotated[int, Field(ge=1)]
    long_prompts: Literal["cut", "drop"]
    long_documents: Literal["cut", "drop"]

    @property
    def has_prompts(self) -> bool:
        """Whether a row asks for an answer, so that a model can be asked to generate one."""
        return self.format != "text"

    @model_validator(mode="after")
    def _consistent(self) -> DatasetConfig:
        if (self.path is None) == (self.generator is None):
            raise ValueError("a data set needs dataset.path=<file, folder or hub id> (or a generator), and not both")
        if self.generator is not None and self.num_rows is None:
            raise ValueError("a generated data set needs num_rows")
        unread = {"text": ("instruction", "input"), "messages": ("input", "output")}.get(self.format, ())
        named = [name for name in unread if getattr(self.fields, name) is not None]
        if named:
            column = "output" if self.format == "text" else "instruction"
            raise ValueError(
                f"fields.{named[0]} has no meaning with format={self.format}; fields.{column} names its one column"
            )
        if self.has_prompts and self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) must be smaller than max_tokens ({self.max_tokens})"
            )
        return self


class DecodingConfig(Section):
    """How answers are generated. `sampling_temperature` 0 is greedy; `top_k` 0 and `no_repeat_ngram_size` 0 are off."""

    sampling_temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0)]
    no_repeat_ngram_size: Annotated[int, Field(ge=0)]
    max_new_tokens: Annotated[int, Field(ge=1)]


class ScoreConfig(Section):
    teacher: bool
    max_new_tokens: Annotated[int, Field(ge=1)]
    sampling_temperature: Annotated[float, Field(ge=0)]
    no_repeat_ngram_size: Annotated[int, Field(ge=0)]
    seed: int


class PartitionConfig(Section):
    """Where the order of the rows is cut: equal counts, or borders `at` quantiles or thresholds of the difficulty."""

    by: Literal["counts", "quantiles", "thresholds"]
    at: tuple[float, ...] | None

    @model_validator(mode="after")
    def _borders(self) -> PartitionConfig:
        if self.by == "counts" and self.at is not None:
            raise ValueError("at gives borders, and by=counts has none; set by=quantiles or by=thresholds")
        if self.by == "thresholds" and self.at is None:
            raise ValueError("by=thresholds needs the borders: at=[…], difficulties in ascending order")
        at = self.at or ()
        if any(one >= other for one, other in itertools.pairwise(at)):
            raise ValueError(f"at must ascend, and is {list(at)}")
        if self.by == "quantiles" and not all(0 < one < 1 for one in at):
            raise ValueError(f"quantiles are shares of the rows between 0 and 1, and at is {list(at)}")
        return self


class TrainConfig(Section):
    seed: int
    lr: Annotated[float, Field(gt=0)]
    lr_end: Annotated[float, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    grad_clip: Annotated[float, Field(gt=0)]
    global_batch_size: Annotated[int, Field(ge=1)]
    max_steps: Annotated[int, Field(ge=1)] | None
    drop_last: bool
    log_every: Annotated[int, Field(ge=1)]
    checkpoint_every: Annotated[int, Field(ge=1)]
    evaluate_every: Annotated[int, Field(ge=0)]
    checkpoint_policy: Literal["last", "best"]
    dev_rows: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] | None
    dev_decoding: DecodingConfig

    @model_validator(mode="after")
    def _lr_falls(self) -> TrainConfig:
        if self.lr_end > self.lr:
            raise ValueError(f"lr_end ({self.lr_end}) must not be above lr ({self.lr})")
        return self


class HardwareConfig(Section):
    name: str
    device: Device
    precision: Literal["float32", "bfloat16"]
    num_threads: Annotated[int, Field(ge=1)] | None
    max_tokens_per_micro_batch: Annotated[int, Field(ge=1)] | None
    objective_memory_mb: Annotated[int, Field(ge=1)]
    num_processes: Annotated[int, Field(ge=1)]
    num_nodes: Annotated[int, Field(ge=1)]
    parallel: Literal["none", "ddp", "fsdp"]
    timeout_seconds: Annotated[int, Field(ge=1)]

    @property
    def num_parts(self) -> int:
        """Into how many parts the models are cut, one a process."""
        return self.num_processes * self.num_nodes if self.parallel == "fsdp" else 1

    @model_validator(mode="after")
    def _consistent(self) -> HardwareConfig:
        several = f"num_processes={self.num_processes} on num_nodes={self.num_nodes}"
        if self.num_processes * self.num_nodes > 1 and self.parallel == "none":
            raise ValueError(f"{several} need parallel=ddp or fsdp; parallel=none is for one process")
        if self.num_processes * self.num_nodes == 1 and self.parallel != "none":
            raise ValueError(f"parallel={self.parallel} is for several processes; set parallel=none")
        if self.num_processes > 1 and ":" in self.device:
            raise ValueError(f"device={self.device} is one device, and each process gets its own; set device=cuda")
        return self


class EvaluationConfig(Section):
    """`datasets` holds shipped names, paths, or mappings with the keys of `dataset`; resolved into DatasetConfig."""

    name: str
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    decoding: DecodingConfig
    model: str | None
    predictions: str | None

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds hold the same seed twice: {list(self.seeds)}")
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) != len(names):
            raise ValueError(f"two data sets share a name: {names}; give a mapping with another name")
        if self.predictions is not None and len(self.datasets) != 1:
            raise ValueError(f"predictions belong to exactly one data set, and datasets holds {len(self.datasets)}")
        return self


class PathsConfig(Section):
    outputs: str


class PlanConfig(Section):
    enabled: bool
    num_rows: Annotated[int, Field(ge=1)] | None


class ComparisonConfig(Section):
    """Arms (named sets of overrides) that `pocl compare` trains and evaluates, each with every method and seed."""

    name: str
    arms: dict[str, tuple[str, ...]]
    only: tuple[str, ...] | None
    baseline: str
    steps_of: str | None
    methods: Annotated[tuple[str, ...], Field(min_length=1)] | None
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    num_jobs: Annotated[int, Field(ge=1)] | None
    confidence: Annotated[float, Field(gt=0, lt=1)]
    num_resamples: Annotated[int, Field(ge=100)]
    resampling_seed: Annotated[int, Field(ge=0)]

    @property
    def chosen(self) -> dict[str, tuple[str, ...]]:
        """The arms that run, in their order."""
        return {name: words for name, words in self.arms.items() if self.only is None or name in self.only}

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonConfig:
        for name in self.arms:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"an arm is named {name!r}; a name has letters, digits, '_', '-' and '.' only")
        for what, entries in (("seeds", self.seeds), ("methods", self.methods or ()), ("only", self.only or ())):
            if len(set(entries)) != len(entries):
                raise ValueError(f"{what} holds the same entry twice: {list(entries)}")
        named = [*(("only", arm) for arm in self.only or ()), ("baseline", self.baseline), ("steps_of", self.steps_of)]
        for what, arm in named:
            if arm is not None and arm not in self.arms:
                guess = nearest(arm, self.arms)
                hint = f"; did you mean {guess!r}?" if guess else ""
                raise ValueError(f"{what} names {arm!r}, and the arms are {', '.join(self.arms)}{hint}")
        if len(self.chosen) < 2:
            raise ValueError(f"a comparison needs two arms or more, and it has {len(self.chosen)}")
        if self.baseline not in self.chosen:
            raise ValueError(f"the baseline {self.baseline!r} is not among the arms of only={list(self.only or ())}")
        return self


class PoclConfig(Section):
    """One chain: the same overrides given to the commands address the same artifacts.

    `teachers` has an entry a stage where the stages have different ones; None is the composed `teacher`. `comparison`
    is there for `pocl compare` alone.
    """

    teacher: TeacherConfig
    teachers: tuple[TeacherConfig | None, ...]
    student: StudentConfig
    dataset: DatasetConfig
    kd_method: KDMethod
    curriculum: Scheduler
    difficulty: DifficultyMeasurer
    score: ScoreConfig
    partition: PartitionConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    hardware: HardwareConfig
    tracker: Tracker
    paths: PathsConfig
    plan: PlanConfig
    upstream: Literal["require", "auto"]
    comparison: ComparisonConfig | None = None
