"""Which artifacts a set of overrides addresses: the four commands compute the same keys and so find each other's work.

A key's identity holds all that decides the artifact's content and nothing else: not the device, threads,
paths, tracker or logging. Raise a kind's version when its output would change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pocl_cli.artifacts.hashing import HashCache, sha256_file
from pocl_cli.artifacts.manifest import ArtifactKey
from pocl_cli.artifacts.store import Store
from pocl_cli.data.sources import dataset_identity
from pocl_cli.errors import DataError
from pocl_cli.models.source import ModelSource, resolve_student, resolve_teacher
from pocl_cli.records import answers_of, asks_teacher, generates, measured_by
from pocl_cli.registry import describe
from pocl_cli.run import Run
from pocl_cli.schema import DatasetConfig, ModelConfig, PoclConfig, TeacherConfig
from pocl_cli.steps.result import obtain

AnyModel = TypeVar("AnyModel", bound=ModelConfig)

VERSIONS = {
    "scores": 3,
    "partitions": 2,
    "answers": 1,
    "teacher_signals": 1,
    "students": 2,
    "evaluations": 2,
    "conversions": 1,
    "comparisons": 1,
}


@dataclass(frozen=True)
class Chain:
    """The artifacts of one run's configuration."""

    run: Run

    @property
    def config(self) -> PoclConfig:
        return self.run.config

    @cached_property
    def store(self) -> Store:
        return Store(Path(self.config.paths.outputs), waits=self.run.waits)

    @cached_property
    def hashes(self) -> HashCache:
        return HashCache(self.store.outputs, writes=not self.config.plan.enabled)

    # ── models ────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def student(self) -> ModelSource:
        """The student before distillation."""
        return resolve_student(self._made(self.config.student), self.store, hashes=self.hashes)

    @cached_property
    def teacher(self) -> ModelSource | None:
        """The teacher; None for `teacher=none`."""
        section = self.config.teacher
        if not section.present:
            return None
        return resolve_teacher(self._made(section), self.store, hashes=self.hashes)

    @cached_property
    def lessons(self) -> list[Chain]:
        """This chain as each stage sees it, with the stage's teacher for its own; empty where all have the same one."""
        if not self.config.kd_method.needs_teacher:
            return []
        sections = [one or self.config.teacher for one in self.config.teachers]
        by_section = {section: self._taught_by(section) for section in sections}
        return [by_section[section] for section in sections]

    @property
    def taught(self) -> list[Chain]:
        """The chains of different teachers, in the order in which they teach; none for a method that needs none."""
        if not self.config.kd_method.needs_teacher:
            return []
        return list({lesson.config.teacher: lesson for lesson in self.lessons}.values()) or [self]

    def _taught_by(self, section: TeacherConfig) -> Chain:
        config = self.config.model_copy(update={"teacher": section, "teachers": ()})
        return Chain(replace(self.run, config=config))

    def model(self, who: str) -> ModelSource:
        """The `student` before distillation, or the `teacher`, which must be there."""
        source = self.student if who == "student" else self.teacher
        assert source is not None, "a chain without a teacher asks none"
        return source

    @property
    def made(self) -> PoclConfig:
        """The configuration of the same step once everything upstream exists: it names artifacts, and no recipe."""
        models: dict[str, Any] = {"student": self._made(self.config.student)} if self._asks_student else {}
        if self._asks_teacher:
            models["teacher"] = self._made(self.config.teacher)
        if self._asks_teacher and self.run.step != "score":
            models["teachers"] = tuple(one and self._made(one) for one in self.config.teachers)
        return self.config.model_copy(update={**models, "upstream": "require"})

    @property
    def _asks_student(self) -> bool:
        """Whether the step depends on the student that these overrides address."""
        return self.run.step != "evaluate" or self.config.evaluation.model in (None, "student")

    @property
    def _asks_teacher(self) -> bool:
        if self.run.step == "evaluate" and self.config.evaluation.model == "teacher":
            return True
        if self.run.step == "score":
            return "teacher" in (*self.measured, *answers_of(self.config.kd_method))
        return self._asks_student and asks_teacher(self.config.kd_method)

    def _made(self, section: AnyModel) -> AnyModel:
        """The section with what its recipe makes, composed from that recipe alone, in the recipe's place."""
        if section.experiment is None:
            return section
        recipe = self.run.recipe(section.experiment, section.overrides)
        artifact = obtain(recipe, "distill", Chain(recipe).student_key, self.store)
        return section.model_copy(update={"path": str(artifact.path), "experiment": None, "overrides": ()})

    # ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def dataset(self) -> dict[str, Any]:
        return self._dataset(self.config.dataset)

    @property
    def measured(self) -> list[str]:
        """What `pocl score` measures, the student last: its scores are the result."""
        teacher = ["teacher"] if self.config.score.teacher and self.teacher is not None else []
        attention = ["attention"] if "attention" in self.scores_beside else []
        return [*teacher, *attention, "student"]

    @property
    def scores_beside(self) -> list[str]:
        """Whose scores the difficulty reads beside the student's."""
        return sorted({measured_by(column) for column in self.config.difficulty.needs} - {"student"})

    def score_key(self, who: str) -> ArtifactKey:
        """The scores of the `student`, its `attention`, or those of the `teacher`, which is not asked to generate."""
        measured = "teacher" if who == "teacher" else "student"
        identity, label = self._reading(self.model(measured)), self._label(measured)
        if who == "student" and self.config.dataset.has_prompts:
            identity["generation"] = self.config.score.model_dump(mode="json", exclude={"teacher"})
        if who == "attention":
            identity["measured"] = who
            label = f"{label}-attention"
        return self._key("scores", f"{label}-on-{self.config.dataset.name}", identity)

    def answers_key(self, who: str) -> ArtifactKey:
        """The answers of one model, `student` or `teacher`, to the training rows, drawn as the KD method says."""
        identity = {**self._reading(self.model(who)), "decoding": asdict(self.config.kd_method.decoding)}
        return self._key("answers", f"{self._label(who)}-on-{self.config.dataset.name}", identity)

    def _reading(self, source: ModelSource) -> dict[str, Any]:
        """What decides how a model reads the training rows."""
        return {
            "model": source.identity,
            "tokenizer": self.student.tokenizer_identity,
            "dataset": self.dataset,
            "precision": self.config.hardware.precision,
        }

    @property
    def stores_teacher(self) -> bool:
        """Whether the teacher's hidden states are stored: by `teacher.store`, for a method that reads them.

        On answers that the student writes it has to run anyway.
        """
        reads = self.config.kd_method.needs_teacher and not generates(self.config.kd_method)
        return self.teacher is not None and self.config.teacher.store and reads

    @property
    def head_key(self) -> ArtifactKey:
        """The teacher's output head."""
        assert self.teacher is not None, "a chain without a teacher stores nothing of it"
        identity = {"part": "head", "teacher": self.teacher.identity}
        return self._key("teacher_signals", f"{self._label('teacher')}-head", identity)

    def shard_key(self, number: int, rows_sha256: str) -> ArtifactKey:
        """The teacher's hidden states on the rows of a shard; these decide it, wherever they are from."""
        assert self.teacher is not None, "a chain without a teacher stores nothing of it"
        identity = {
            "part": "shard",
            "teacher": self.teacher.identity,
            "tokenizer": self.teacher.tokenizer_identity,
            "precision": self.config.hardware.precision,
            "rows": rows_sha256,
        }
        slug = f"{self._label('teacher')}-on-{self.config.dataset.name}-shard-{number:04d}"
        return self._key("teacher_signals", slug, identity)

    def conversion_key(self, label: str, files: dict[str, str]) -> ArtifactKey:
        """Pickled weights as safetensors, by the sha256 of the files of the model."""
        return self._key("conversions", f"{label}-safetensors", {"files": files})

    @cached_property
    def partition_key(self) -> ArtifactKey:
        difficulty = self.config.difficulty
        identity: dict[str, Any] = {
            "difficulty": describe(difficulty),
            "num_subsets": self.config.curriculum.stages,
            "cut": self.config.partition.model_dump(mode="json"),
        }
        if difficulty.needs:
            identity["scores"] = self.score_key("student").id
            identity |= {f"{who}_scores": self.score_key(who).id for who in self.scores_beside}
        else:
            identity |= {"dataset": self.dataset, "tokenizer": self.student.tokenizer_identity}
        slug = f"{self.config.dataset.name}-{difficulty.name}-{self.config.curriculum.stages}-subsets"
        return self._key("partitions", slug, identity)

    @cached_property
    def student_key(self) -> ArtifactKey:
        config = self.config
        train = config.train.model_dump(mode="json", exclude={"log_every", "checkpoint_every"})
        identity: dict[str, Any] = {
            "student": self.student.identity,
            "dropout": config.student.dropout,
            "dataset": self.dataset,
            "kd_method": describe(config.kd_method),
            "curriculum": describe(config.curriculum),
            "train": train,
            "precision": config.hardware.precision,
        }
        if config.student.lora.rank:
            identity["lora"] = config.student.lora.model_dump(mode="json")
        if config.kd_method.needs_teacher:
            assert self.teacher is not None, "configuration refuses a method that needs a teacher and has none"
            identity["teacher"] = self.teacher.identity
        if self.lessons:
            identity["teacher"] = [lesson.model("teacher").identity for lesson in self.lessons]
        if config.curriculum.needs_partition:
            identity["partition"] = self.partition_key.id
        if answerers := answers_of(config.kd_method):
            identity["answers"] = {who: self.answers_key(who).id for who in answerers}
        slug = f"{self._label('student')}-{config.kd_method.name}-{config.curriculum.name}-seed{config.train.seed}"
        return self._key("students", slug, identity)

    @cached_property
    def evaluated(self) -> tuple[ModelSource, str]:
        """The model that is evaluated, and its short name."""
        which = self.config.evaluation.model
        if which == "teacher":
            assert self.teacher is not None, "configuration refuses the teacher of teacher=none"
            return self.teacher, self._label("teacher")
        if which in (None, "student"):
            artifact = obtain(self.run, "distill", self.student_key, self.store)
            return self._at(str(artifact.path)), self.student_key.slug
        source = self._at(which)
        return source, source.label

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """How models are evaluated: the data sets, and how answers are drawn."""
        evaluation = self.config.evaluation
        return {
            "datasets": {one.name: self._dataset(one) for one in evaluation.datasets},
            "seeds": list(evaluation.seeds),
            "decoding": evaluation.decoding.model_dump(mode="json"),
        }

    @cached_property
    def evaluation_key(self) -> ArtifactKey:
        """The evaluation of a model, or of answers made elsewhere, on the configured sets."""
        evaluation = self.config.evaluation
        identity: dict[str, Any] = {"datasets": self.protocol["datasets"]}
        if evaluation.predictions is not None:
            path = Path(evaluation.predictions).expanduser()
            if not path.is_file():
                fix = "name a JSON lines file, an answer a row"
                raise DataError(f"no file {path}", where="evaluation.predictions", fix=fix)
            label = path.name.split(".")[0]
            identity["model"] = {"predictions": sha256_file(path)}
        else:
            source, label = self.evaluated
            identity = {
                **self.protocol,
                "model": source.identity,
                "precision": self.config.hardware.precision,
            }
        return self._key("evaluations", f"{label}-on-{evaluation.name}", identity)

    def _at(self, path: str) -> ModelSource:
        section = TeacherConfig(
            name="evaluated",
            path=path,
            experiment=None,
            overrides=(),
            revision=None,
            dtype="auto",
            allow_pickle=False,
            store=False,
        )
        return resolve_teacher(section, self.store, hashes=self.hashes)

    def _label(self, who: str) -> str:
        """A short name for slugs: of a student made here its recipe's, else the folder's or the hub's."""
        source, section = self.model(who), self.config.student if who == "student" else self.config.teacher
        return section.name if "student" in source.identity else source.label

    def _dataset(self, config: DatasetConfig) -> dict[str, Any]:
        return dataset_identity(config, self.hashes.sha256_file)

    def _key(self, kind: str, slug: str, identity: dict[str, Any]) -> ArtifactKey:
        return ArtifactKey(kind, slug, identity, VERSIONS[kind])
