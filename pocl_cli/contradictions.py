"""Rules that join sections of a configuration: what no section can see by itself."""

from __future__ import annotations

from collections.abc import Iterator

from pocl_cli.errors import ConfigError, PoclError
from pocl_cli.records import answers_of, asks_teacher, generates, may_end_early, reads_teacher
from pocl_cli.schema import PoclConfig

# Columns of scores that only rows with a prompt have.
_OF_ANSWERS = frozenset({"rouge_l", "cross_entropy_alone"})


def contradictions(config: PoclConfig, step: str) -> Iterator[PoclError]:
    """What contradicts what. A chain may lack what a step does not need, so some rules belong to a step."""
    trains = step in ("distill", "compare") or (step == "evaluate" and _evaluates_the_student(config))
    # A partition may have the rows scored first, and who scores makes the answers.
    if trains or step in ("score", "partition"):
        yield from _method_fits(config, trains=trains)
    if trains:
        yield from _student_answers_fit(config)
        yield from _parts_fit(config)
    yield from _command_fits(config, step)
    if step in ("score", "partition") or (trains and config.curriculum.needs_partition):
        yield from _teacher_is_measured(config)
        yield from _text_is_measured(config)
    if trains and may_end_early(config.curriculum):
        yield from _stages_may_converge(config)
    yield from _text_has_no_answers(config, step)
    if config.partition.at is not None and (config.curriculum.needs_partition or step == "partition"):
        yield from _borders_fit(config, len(config.partition.at))
    yield from _plan_fits(config, step)
    yield from _dev_rows_fit(config)
    yield from _rows_are_left(config)


def _method_fits(config: PoclConfig, *, trains: bool) -> Iterator[PoclError]:
    """The teachers and rows that a KD method asks for, in training or, where answers are made, before."""
    method = config.kd_method
    answerers = answers_of(method)
    if (asks_teacher(method) if trains else "teacher" in answerers) and not config.teacher.present:
        yield ConfigError(
            f"kd_method={method.name} needs a teacher",
            why="teacher=none",
            fix="choose one with teacher=NAME or teacher.path=…, or train without with kd_method=sft",
        )
    if trains and config.teachers:
        yield from _teachers_fit(config)
    if answerers and not config.dataset.has_prompts:
        yield ConfigError(
            f"kd_method={method.name} with dataset.format=text",
            why="it trains on answers, and plain text asks for none",
            fix="choose a data set with prompts, or another kd_method",
        )


def _parts_fit(config: PoclConfig) -> Iterator[PoclError]:
    """What cannot be cut into parts."""
    if config.hardware.parallel != "fsdp":
        return
    if getattr(config.kd_method, "teacher_mix", False):
        yield ConfigError(
            f"kd_method.teacher_mix={config.kd_method.teacher_mix} with hardware.parallel=fsdp",
            why="the teacher is in parts then, and the processes ask it for answers of different lengths",
            fix="set kd_method.teacher_mix=0, or hardware.parallel=ddp",
        )
    if config.student.lora.rank:
        yield ConfigError(
            "student.lora with hardware.parallel=fsdp",
            why="what fsdp divides among processes, gradients and moments, adapters hardly have",
            fix="set hardware.parallel=ddp, or none for one process",
        )


def _command_fits(config: PoclConfig, step: str) -> Iterator[PoclError]:
    """What one command asks for or cannot do."""
    if step == "distill" and not config.plan.enabled:
        try:
            config.tracker.check()
        except ConfigError as error:
            yield error
    if step == "compare" and not _evaluates_the_student(config):
        yield ConfigError(
            "pocl compare with evaluation.model or evaluation.predictions",
            why="it evaluates the students of its arms",
            fix="leave both out",
        )
    if step == "evaluate" and config.evaluation.model == "teacher" and not config.teacher.present:
        yield ConfigError(
            "evaluation.model=teacher without a teacher",
            why="teacher=none",
            fix="choose a teacher with teacher=NAME or teacher.path=…",
        )


def _plan_fits(config: PoclConfig, step: str) -> Iterator[PoclError]:
    if config.plan.enabled and step not in ("distill", "compare"):
        yield ConfigError(
            f"plan=true with pocl {step}", why="only distill and compare have a plan", fix="pocl distill plan=true …"
        )
    if config.plan.num_rows is not None and not config.plan.enabled:
        yield ConfigError("plan.num_rows without plan=true", why="only the plan reads it", fix="add plan=true")
    if config.plan.num_rows is not None and config.curriculum.needs_partition:
        yield from _stages_fit(config, config.plan.num_rows, f"plan.num_rows={config.plan.num_rows}")
    if config.plan.num_rows is not None and config.curriculum.needs_partition and config.partition.by != "counts":
        yield ConfigError(
            f"plan.num_rows with partition.by={config.partition.by}",
            why="the sizes of such subsets are known from the difficulties alone",
            fix="leave out plan.num_rows, or set partition.by=counts",
        )


def _rows_are_left(config: PoclConfig) -> Iterator[PoclError]:
    limit, dev_size = config.dataset.limit, config.dataset.dev_size
    if limit is not None and dev_size >= limit:
        yield ConfigError(
            f"dataset.dev_size={dev_size} takes all of dataset.limit={limit} rows",
            why="nothing is left to train on",
            fix="make dev_size smaller or limit larger (dev_size=0 trains without dev evaluation)",
        )
    elif limit is not None and config.curriculum.needs_partition and config.dataset.has_prompts:
        yield from _stages_fit(config, limit - dev_size, f"dataset.limit={limit} less dataset.dev_size={dev_size}")


def _dev_rows_fit(config: PoclConfig) -> Iterator[PoclError]:
    dev_rows, stages = config.train.dev_rows, config.curriculum.stages
    if isinstance(dev_rows, tuple) and len(dev_rows) != stages:
        yield ConfigError(
            f"train.dev_rows={list(dev_rows)} does not fit curriculum.stages={stages}",
            why=f"it has {len(dev_rows)} numbers for {stages} stages",
            fix="give one number for all stages, or a list with one a stage",
        )
    most = max(dev_rows if isinstance(dev_rows, tuple) else (dev_rows or 0,), default=0)
    if most > config.dataset.dev_size:
        yield ConfigError(
            f"train.dev_rows={most} is more than there are dev rows",
            why=f"dataset.dev_size={config.dataset.dev_size}",
            fix="make dev_rows smaller or dev_size larger",
        )


def _evaluates_the_student(config: PoclConfig) -> bool:
    """Whether `pocl evaluate` is about the student that these overrides address, and so about its training."""
    return config.evaluation.predictions is None and config.evaluation.model in (None, "student")


def _teachers_fit(config: PoclConfig) -> Iterator[PoclError]:
    if len(config.teachers) != config.curriculum.stages:
        yield ConfigError(
            f"teachers has {len(config.teachers)} entries for curriculum.stages={config.curriculum.stages}",
            why="every stage has one teacher",
            fix="give one a stage, null for the composed teacher; or teachers=[] for that one in all stages",
        )
    if not config.teacher.present:
        yield ConfigError(
            "teachers with teacher=none",
            why="the teachers of the stages stand in for the composed one",
            fix="choose the last, strongest one with teacher=NAME, or set teachers=[]",
        )
    for index, teacher in enumerate(config.teachers):
        if teacher is not None and not teacher.present:
            yield ConfigError(
                f"teachers.{index} names no model",
                why="path and experiment are both null",
                fix="give one of them, the name of a teacher, or null for the composed one",
            )
    if "teacher" in answers_of(config.kd_method):
        yield ConfigError(
            f"kd_method={config.kd_method.name} with teachers",
            why="it trains on stored answers, which are those of one teacher",
            fix="set teachers=[], or choose a method that reads the teacher's distributions (kd_method=fkl, jsd, …)",
        )


def _student_answers_fit(config: PoclConfig) -> Iterator[PoclError]:
    """What a method asks for whose student answers prompts while it is trained."""
    method = config.kd_method
    if generates(method) and not config.dataset.has_prompts:
        yield ConfigError(
            f"kd_method={method.name} with dataset.format=text",
            why="its student answers prompts while it is trained, and plain text has none",
            fix="choose rows with prompts, or a method that trains on the rows alone (kd_method=fkl, jsd, …)",
        )
    if getattr(method, "needs_dev", False) and (config.train.evaluate_every == 0 or config.dataset.dev_size == 0):
        yield ConfigError(
            f"kd_method={method.name} without dev evaluations",
            why="the dev loss decides how many steps use the student's answers",
            fix="set train.evaluate_every and dataset.dev_size above 0, or kd_method.share_step=0 for a constant share",
        )
    size = getattr(method, "buffer_size", None)
    if size is not None and size < config.train.global_batch_size:
        yield ConfigError(
            f"kd_method.buffer_size={size} is less than train.global_batch_size={config.train.global_batch_size}",
            why="a step may draw a whole batch from the buffer",
            fix=f"set kd_method.buffer_size to at least {config.train.global_batch_size}",
        )


def _stages_may_converge(config: PoclConfig) -> Iterator[PoclError]:
    where = f"curriculum.convergence.metric={config.curriculum.convergence.metric}"
    if config.train.evaluate_every == 0 or config.dataset.dev_size == 0:
        yield ConfigError(
            f"{where} without dev evaluations",
            why="they decide when a stage ends",
            fix="set train.evaluate_every and dataset.dev_size above 0, or curriculum.convergence.metric=null",
        )
    if config.curriculum.convergence.metric == "dev_rouge_l" and not config.dataset.has_prompts:
        yield ConfigError(
            f"{where} with dataset.format=text",
            why="plain text has no answers to score",
            fix="set curriculum.convergence.metric=dev_cross_entropy",
        )
    if config.train.max_steps is not None:
        yield ConfigError(
            f"{where} with train.max_steps",
            why="which stage a stop falls into would depend on when earlier ones converge",
            fix="set train.max_steps=null and bound the stages with curriculum.epochs_per_stage",
        )


def _teacher_is_measured(config: PoclConfig) -> Iterator[PoclError]:
    if reads_teacher(config.difficulty.needs) and not (config.teacher.present and config.score.teacher):
        yield ConfigError(
            f"difficulty={config.difficulty.name} needs the teacher's scores",
            why="score.teacher=false" if config.teacher.present else "teacher=none",
            fix="set score.teacher=true and choose a teacher, or another difficulty",
        )


def _text_is_measured(config: PoclConfig) -> Iterator[PoclError]:
    unmeasured = sorted(_OF_ANSWERS & config.difficulty.needs)
    if unmeasured and not config.dataset.has_prompts:
        yield ConfigError(
            f"difficulty={config.difficulty.name} with dataset.format=text",
            why=f"it reads {', '.join(unmeasured)}, and plain text has neither prompts nor answers",
            fix="set difficulty=cross_entropy or difficulty=length",
        )


def _text_has_no_answers(config: PoclConfig, step: str) -> Iterator[PoclError]:
    texts = [one.name for one in config.evaluation.datasets if not one.has_prompts]
    scores = "pocl compare" if step == "compare" else "evaluation.predictions"
    if texts and (step == "compare" or (step == "evaluate" and config.evaluation.predictions is not None)):
        yield ConfigError(
            f"{scores} with plain text ({texts[0]})",
            why="it is about answers, and plain text (format=text) has none",
            fix="leave out that data set; pocl evaluate gives its perplexity under a model",
        )


def _borders_fit(config: PoclConfig, num_borders: int) -> Iterator[PoclError]:
    if num_borders != config.curriculum.stages - 1:
        yield ConfigError(
            f"partition.at has {num_borders} borders for {config.curriculum.stages} subsets",
            why="there is one border less than there are curriculum.stages",
            fix=f"give {config.curriculum.stages - 1}, or set curriculum.stages={num_borders + 1}",
        )


def _stages_fit(config: PoclConfig, num_rows: int, given: str) -> Iterator[PoclError]:
    if config.curriculum.stages > num_rows:
        yield ConfigError(
            f"curriculum.stages={config.curriculum.stages} is more than there are training rows",
            why=f"{given} leaves {num_rows}",
            fix=f"set curriculum.stages to at most {num_rows}, or use more rows",
        )
