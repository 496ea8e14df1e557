"""From the plain values of a composed configuration to the frozen one; every mistake is found at once. No Hydra."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pocl_cli.errors import ConfigError, PoclError, SecurityError, nearest
from pocl_cli.mistakes import CALL_KEYS, FAMILIES, MultiConfigError, explain_validation
from pocl_cli.records import Convergence, answers_of, asks_teacher, reads_teacher
from pocl_cli.registry import describe
from pocl_cli.schema import PoclConfig
from pocl_cli.teacher_list import with_teachers

LOCAL = "local"
# Columns of scores that only rows with a prompt have.
_OF_ANSWERS = frozenset({"rouge_l", "cross_entropy_alone"})


def validate(
    values: Mapping[str, Any],
    step: str,
    *,
    names: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    teacher_names: Sequence[str] = (),
    teacher_presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> PoclConfig:
    """The frozen configuration that plain values describe.

    Args:
        values: what was composed, interpolations resolved.
        step: the command that it is for: some rules belong to one.
        names: the options of the group `dataset`.
        presets: the values of those options that `preset_names` asks for.
        teacher_names: the options of the group `teacher`.
        teacher_presets: the values of those options that `named_teachers` asks for.

    Raises:
        MultiConfigError: every mistake, nearest keys named.
    """
    errors: list[PoclError] = [_refused(path) for path in keys_of(values) if path.rpartition(".")[2] in CALL_KEYS]
    checked = {key: _without_calls(value) for key, value in values.items()}
    checked = _with_datasets(checked, names, presets, errors)
    checked = with_teachers(checked, teacher_names, teacher_presets or {}, errors)
    for section, family in FAMILIES.items():
        if section not in checked:
            continue
        try:
            checked[section] = family.build(checked[section])
        except ValidationError as error:
            errors += explain_validation(error, values, above=(section,))
        except PoclError as error:
            errors.append(error)
    try:
        config = PoclConfig.model_validate(checked)
    except ValidationError as error:
        errors += explain_validation(error, checked)
    else:
        if not errors:
            errors += _contradictions(config, step)
    if errors:
        raise MultiConfigError(errors)
    return config


def plain_values(config: PoclConfig) -> dict[str, Any]:
    """A checked configuration as values that JSON holds; `from_plain_values` makes it again."""
    families = {section: describe(getattr(config, section)) for section in FAMILIES}
    return {**config.model_dump(mode="json", exclude=set(FAMILIES)), **families}


def from_plain_values(values: Mapping[str, Any]) -> PoclConfig:
    """The configuration that `plain_values` was given."""
    families = {section: family.build(values[section]) for section, family in FAMILIES.items()}
    return PoclConfig.model_validate({**values, **families})


def preset_names(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The options of the group `dataset` that `evaluation.datasets` is made from."""
    entries = _entries(values)
    asked = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if name == LOCAL or name in asked]


def keys_of(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of nested values, those of sections among them; an entry of a list has its index."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from keys_of(value, f"{prefix}{key}.")
    elif isinstance(values, list | tuple):
        for index, entry in enumerate(values):
            yield from keys_of(entry, f"{prefix}{index}.")


def _refused(path: str) -> SecurityError:
    return SecurityError(
        f"refused key {path}",
        where="the configuration",
        why=f"keys such as {path.rpartition('.')[2]} name code to run",
        fix="remove it; KD methods, curricula, difficulties and trackers of your own are registered in Python",
    )


def _without_calls(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_calls(value) for key, value in values.items() if key not in CALL_KEYS}
    return [_without_calls(entry) for entry in values] if isinstance(values, list | tuple) else values


# ── rules that join sections ──────────────────────────────────────────────────────────────────────────────────────────


def _contradictions(config: PoclConfig, step: str) -> Iterator[PoclError]:
    """What no section can see by itself. A chain may lack what a step does not need, so some rules belong to a step."""
    trains = step in ("distill", "compare") or (step == "evaluate" and _evaluates_the_student(config))
    answers = answers_of(config.kd_method)
    # A partition may have the rows scored first, and who scores makes the answers.
    answered = trains or step in ("score", "partition")
    asks = asks_teacher(config.kd_method) if trains else answered and "teacher" in answers
    if asks and not config.teacher.present:
        yield ConfigError(
            f"kd_method={config.kd_method.name} needs a teacher",
            why="teacher=none",
            fix="choose one with teacher=NAME or teacher.path=…, or train without with kd_method=sft",
        )
    if trains and config.teachers:
        yield from _teachers_fit(config)
    if answered and answers and not config.dataset.has_prompts:
        yield ConfigError(
            f"kd_method={config.kd_method.name} with dataset.format=text",
            why="it trains on answers, and plain text asks for none",
            fix="choose a data set with prompts, or another kd_method",
        )
    if trains and generates(config) and not config.dataset.has_prompts:
        yield ConfigError(
            f"kd_method={config.kd_method.name} with dataset.format=text",
            why="its student answers prompts while it is trained, and plain text has none",
            fix="choose rows with prompts, or a method that trains on the rows alone (kd_method=fkl, jsd, …)",
        )
    if trains:
        yield from _share_of_answers_fits(config)
    if trains and getattr(config.kd_method, "teacher_mix", False) and config.hardware.parallel == "fsdp":
        yield ConfigError(
            f"kd_method.teacher_mix={config.kd_method.teacher_mix} with hardware.parallel=fsdp",
            why="the teacher is in parts then, and the processes ask it for answers of different lengths",
            fix="set kd_method.teacher_mix=0, or hardware.parallel=ddp",
        )
    if trains and config.student.lora.rank and config.hardware.parallel == "fsdp":
        yield ConfigError(
            "student.lora with hardware.parallel=fsdp",
            why="what fsdp divides among processes, gradients and moments, adapters hardly have",
            fix="set hardware.parallel=ddp, or none for one process",
        )
    if step == "distill" and not config.plan.enabled:
        try:
            config.tracker.check()
        except ConfigError as error:
            yield error
    if config.plan.enabled and step not in ("distill", "compare"):
        yield ConfigError(
            f"plan=true with pocl {step}", why="only distill and compare have a plan", fix="pocl distill plan=true …"
        )
    if step == "compare" and not _evaluates_the_student(config):
        yield ConfigError(
            "pocl compare with evaluation.model or evaluation.predictions",
            why="it evaluates the students of its arms",
            fix="leave both out",
        )
    if config.plan.num_rows is not None and not config.plan.enabled:
        yield ConfigError("plan.num_rows without plan=true", why="only the plan reads it", fix="add plan=true")
    if config.plan.num_rows is not None and config.curriculum.needs_partition:
        yield from _stages_fit(config, config.plan.num_rows, f"plan.num_rows={config.plan.num_rows}")
    if step in ("score", "partition") or (trains and config.curriculum.needs_partition):
        yield from _teacher_is_measured(config)
        yield from _text_is_measured(config)
    if trains and may_end_early(config):
        yield from _stages_may_converge(config)
    yield from _text_has_no_answers(config, step)
    if config.partition.at is not None and (config.curriculum.needs_partition or step == "partition"):
        yield from _borders_fit(config, len(config.partition.at))
    if config.plan.num_rows is not None and config.curriculum.needs_partition and config.partition.by != "counts":
        yield ConfigError(
            f"plan.num_rows with partition.by={config.partition.by}",
            why="the sizes of such subsets are known from the difficulties alone",
            fix="leave out plan.num_rows, or set partition.by=counts",
        )
    if step == "evaluate" and config.evaluation.model == "teacher" and not config.teacher.present:
        yield ConfigError(
            "evaluation.model=teacher without a teacher",
            why="teacher=none",
            fix="choose a teacher with teacher=NAME or teacher.path=…",
        )
    yield from _dev_rows_fit(config)
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


def may_end_early(config: PoclConfig) -> bool:
    """Whether stages may end by a rule; a scheduler of a plugin need not know of any."""
    rule: Convergence | None = getattr(config.curriculum, "convergence", None)
    return rule is not None and rule.metric is not None


def generates(config: PoclConfig) -> bool:
    """Whether the student answers prompts while it is trained; most KD methods know of no such thing."""
    return bool(getattr(config.kd_method, "generates", False))


def _share_of_answers_fits(config: PoclConfig) -> Iterator[PoclError]:
    method = config.kd_method
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


# ── evaluation.datasets ───────────────────────────────────────────────────────────────────────────────────────────────


def _entries(values: Mapping[str, Any]) -> Sequence[Any]:
    evaluation = values.get("evaluation")
    entries = evaluation.get("datasets") if isinstance(evaluation, Mapping) else None
    return entries if isinstance(entries, list | tuple) else ()


def _with_datasets(
    values: dict[str, Any],
    names: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    errors: list[PoclError],
) -> dict[str, Any]:
    """`values` with `evaluation.datasets` as full mappings. For an entry that cannot be one, an error is added."""
    entries = _entries(values)
    if not entries:
        return values
    datasets: list[Mapping[str, Any]] = []
    for index, entry in enumerate(entries):
        try:
            datasets.append(_dataset(entry, f"evaluation.datasets.{index}", names, presets))
        except PoclError as error:
            errors.append(error)
            # Keeps the places of the other entries, and makes no errors of its own.
            datasets.append({**presets[LOCAL], "name": f"entry {index}", "path": "."})
    return {**values, "evaluation": {**values["evaluation"], "datasets": datasets}}


def _dataset(
    entry: Any, where: str, names: Sequence[str], presets: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    if isinstance(entry, str) and entry in names and entry != LOCAL:
        return presets[entry]
    if isinstance(entry, str) and (re.search(r"[./\\~]", entry) or Path(entry).exists()):
        return {**presets[LOCAL], "name": _name_of(entry), "path": entry, "dev_size": 0}
    if isinstance(entry, str):
        guess = nearest(entry, names)
        raise ConfigError(
            f"unknown data set {entry!r}",
            where=where,
            why=f"known are {', '.join(name for name in names if name != LOCAL)}, and there is no file of that name",
            fix=f"did you mean {guess!r}?" if guess else "a path has a slash or an ending: ./rows.jsonl",
        )
    if isinstance(entry, Mapping):
        named = entry.get("name") in names
        base = dict(presets[entry["name"] if named else LOCAL])
        if not named:
            base["dev_size"] = 0
            if "name" not in entry and isinstance(entry.get("path"), str):
                base["name"] = _name_of(entry["path"])
        fields = entry.get("fields")
        merged = {**base["fields"], **fields} if isinstance(fields, Mapping) else (fields or base["fields"])
        return {**base, **{str(key): value for key, value in entry.items()}, "fields": merged}
    raise ConfigError(
        f"bad entry {entry!r}",
        where=where,
        why="an entry is a name, a path, or a mapping with keys of dataset",
        fix="evaluation.datasets=[dolly_eval,./rows.jsonl,{name: mine, path: ./rows.jsonl, limit: 100}]",
    )


def _name_of(path: str) -> str:
    return Path(path).name.split(".")[0] or "rows"
