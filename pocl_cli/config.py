"""From command-line overrides to a checked configuration. With `cli`, the only module that knows Hydra."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from pocl_cli.errors import ConfigError, PoclError, SecurityError, nearest
from pocl_cli.registry import Registry, difficulty_measurers, kd_methods, schedulers, trackers
from pocl_cli.schema import PoclConfig

FAMILIES: dict[str, Registry] = {
    "kd_method": kd_methods,
    "curriculum": schedulers,
    "difficulty": difficulty_measurers,
    "tracker": trackers,
}
# What passes from a caller to the recipe that makes its teacher or student (DESIGN §1).
PASSED_ON = ("paths", "hardware", "tracker", "upstream")


class ConfigErrors(ConfigError):
    """Several mistakes, all shown at once."""

    def __init__(self, errors: Sequence[PoclError]) -> None:
        assert errors, "no error to show"
        super().__init__(f"{len(errors)} mistakes in the configuration")
        self.errors = list(errors)
        self.exit_code = max(error.exit_code for error in errors)


@dataclass(frozen=True)
class Run:
    """One step's checked configuration, with what a person typed and the plain values that the manifest keeps."""

    step: str
    config: PoclConfig
    overrides: tuple[str, ...]
    resolved: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        return ["pocl", self.step, *self.overrides]

    def command_for(self, step: str, *more: str) -> str:
        """The shell command of another step of the same chain."""
        import shlex

        return shlex.join(["pocl", step, *self.overrides, *more])

    def for_step(self, step: str) -> Run:
        """The same chain, addressed by another step."""
        return Run(step, self.config, self.overrides, self.resolved)


def conf_dir() -> Path:
    """The shipped configuration: inside the package in a wheel, at the repository's top in an editable install."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


class _UserConfigPath(SearchPathPlugin):
    """Puts the folders of `--config-dir` and `POCL_CONFIG_PATH` before the shipped ones, so that they can shadow them."""

    folders: tuple[str, ...] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.folders):
            search_path.prepend("user", f"file://{folder}")


def add_user_config(folders: Iterable[str]) -> None:
    """Makes a user's own YAML folders part of every composition from now on."""
    absolute = []
    for folder in folders:
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(
                f"no configuration folder {folder}",
                why="--config-dir and POCL_CONFIG_PATH name existing folders",
                fix="create it, with a sub-folder per group (kd_method, experiment, …)",
            )
        absolute.append(str(path))
    _UserConfigPath.folders = tuple(absolute)
    if absolute:
        Plugins.instance().register(_UserConfigPath)


def from_hydra(step: str, cfg: DictConfig, overrides: Sequence[str]) -> Run:
    """Checks what Hydra composed. Raises ConfigErrors with every mistake found."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"cannot resolve {error.full_key or 'the configuration'}",
            why=_first_line(error),
            fix="give the key a value on the command line",
        ) from error
    assert isinstance(values, dict), "a composed configuration is a mapping"
    values.pop("experiment", None)
    return Run(step, validate({str(key): value for key, value in values.items()}, step), tuple(overrides), values)


def compose_run(step: str, overrides: Sequence[str]) -> Run:
    """Composes and checks a configuration inside a running Hydra application (or `initialize_config_dir`)."""
    try:
        cfg = compose(config_name=step, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigErrors([explain(error, None)]) from error
    return from_hydra(step, cfg, overrides)


def recipe(caller: Run, experiment: str, overrides: Sequence[str]) -> Run:
    """The run of `experiment=NAME` that makes a caller's teacher or student: composed from that recipe alone."""
    known = GlobalHydra.instance().config_loader().get_group_options("experiment")
    if experiment not in known and not experiment.startswith("paper/"):
        guess = nearest(experiment, known)
        raise ConfigError(
            f"unknown experiment {experiment!r}",
            why=f"known are {', '.join(known)}",
            fix=f"did you mean {guess!r}?" if guess else "add conf/experiment/NAME.yaml in a --config-dir folder",
        )
    passed = [
        o for o in caller.overrides if re.split(r"[.=]", o.lstrip("+~"))[0].removesuffix("@_global_") in PASSED_ON
    ]
    return compose_run("distill", [f"experiment={experiment}", *passed, *overrides])


def validate(values: dict[str, Any], step: str) -> PoclConfig:
    """The frozen configuration that plain values describe. Raises ConfigErrors with every mistake, nearest keys named."""
    errors: list[PoclError] = []
    checked = dict(values)
    refused = [path for path in _walk_keys(values) if path.rsplit(".", 1)[-1].startswith("_")]
    for path in refused:
        errors.append(
            SecurityError(
                f"refused key {path}",
                where="the configuration",
                why="keys such as _target_ name code to run",
                fix="remove it; new KD methods and metrics are registered in Python",
            )
        )
    if not refused:
        for section, family in FAMILIES.items():
            try:
                checked[section] = family.build(checked.get(section) or {})
            except ValidationError as error:
                errors += _explain_validation(error, section, values)
            except PoclError as error:
                errors.append(error)
        try:
            checked = _with_datasets(checked)
        except PoclError as error:
            errors.append(error)
            checked["evaluation"] = {**checked["evaluation"], "datasets": (checked["dataset"],)}
        try:
            config = PoclConfig.model_validate(checked)
        except ValidationError as error:
            errors += _explain_validation(error, "", values)
        else:
            errors += _contradictions(config, step)
    if errors:
        raise ConfigErrors(errors)
    return config


def _contradictions(config: PoclConfig, step: str) -> Iterator[PoclError]:
    """Rules that join sections. A chain may lack what a step does not need, so some belong to one step."""
    if step == "distill" and config.kd_method.needs_teacher and not config.teacher.present:
        yield ConfigError(
            f"kd_method={config.kd_method.name} needs a teacher",
            why="teacher=none",
            fix="choose one with teacher=NAME or teacher.path=…, or train without with kd_method=sft",
        )
    if step == "distill":
        try:
            config.tracker.check()
        except ConfigError as error:
            yield error
    if config.plan.enabled and step != "distill":
        yield ConfigError(f"plan=true with pocl {step}", why="only distill has a plan", fix="pocl distill plan=true …")
    if config.plan.num_rows is not None and not config.plan.enabled:
        yield ConfigError("plan.num_rows without plan=true", why="it is read by the plan only", fix="add plan=true")
    if config.evaluation.model == "teacher" and not config.teacher.present and step == "evaluate":
        yield ConfigError("evaluation.model=teacher", why="teacher=none", fix="choose a teacher with teacher=NAME")
    if config.dataset.limit is not None and config.dataset.dev_size >= config.dataset.limit:
        yield ConfigError(
            f"dataset.dev_size={config.dataset.dev_size} takes all of dataset.limit={config.dataset.limit} rows",
            why="nothing is left to train on",
            fix="make dev_size smaller or limit larger (dev_size=0 trains without dev evaluation)",
        )


def _with_datasets(values: dict[str, Any]) -> dict[str, Any]:
    """`evaluation.datasets` as full dataset mappings: shipped names and paths are presets of the group `dataset`."""
    evaluation = values.get("evaluation")
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("datasets"), list | tuple):
        return values
    datasets = [_dataset(entry) for entry in evaluation["datasets"]]
    return {**values, "evaluation": {**evaluation, "datasets": tuple(datasets)}}


def _dataset(entry: Any) -> dict[str, Any]:
    shipped = GlobalHydra.instance().config_loader().get_group_options("dataset")
    if isinstance(entry, str) and entry in shipped and entry != "local":
        return _preset(entry)
    if isinstance(entry, str):
        if not re.search(r"[./\\]", entry) and not Path(entry).exists():
            guess = nearest(entry, shipped)
            raise ConfigError(
                f"unknown data set {entry!r}",
                where="evaluation.datasets",
                why=f"known are {', '.join(shipped)}; a path has a slash or an ending",
                fix=f"did you mean {guess!r}?" if guess else "give a path such as ./rows.jsonl",
            )
        name = Path(entry).name.split(".")[0]
        return {**_preset("local"), "name": name, "path": entry, "dev_size": 0}
    if isinstance(entry, dict):
        base = _preset(entry["name"]) if entry.get("name") in shipped else {**_preset("local"), "dev_size": 0}
        if "name" not in entry and isinstance(entry.get("path"), str):
            base["name"] = Path(entry["path"]).name.split(".")[0]
        return {**base, **entry, "fields": {**base["fields"], **(entry.get("fields") or {})}}
    raise ConfigError(
        f"bad entry {entry!r}", where="evaluation.datasets", why="entries are names, paths or mappings", fix="see conf/dataset"
    )


def _preset(name: str) -> dict[str, Any]:
    values = OmegaConf.to_container(compose(config_name=f"dataset/{name}").dataset, resolve=True)
    assert isinstance(values, dict), "a data set preset is a mapping"
    return {str(key): value for key, value in values.items()}


# ── explaining mistakes ───────────────────────────────────────────────────────────────────────────────────────────


def diagnose(step: str, overrides: Sequence[str]) -> list[PoclError]:
    """Every override that does not compose, each explained: Hydra itself stops at the first."""
    errors: list[PoclError] = []
    good: list[str] = []
    # Group choices first: a key may exist only in the option that another override chooses.
    for override in sorted(overrides, key=lambda o: "." in o.split("=", 1)[0]):
        try:
            compose(config_name=step, overrides=[*good, override])
            good.append(override)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            errors.append(explain(error, override, step, good))
    try:
        from_hydra(step, compose(config_name=step, overrides=good), good)
    except ConfigErrors as more:
        errors += more.errors
    except PoclError as error:
        errors.append(error)
    return errors


def explain(error: Exception, override: str | None, step: str | None = None, good: Sequence[str] = ()) -> PoclError:
    """A composition error in our words, with the nearest right name."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (found := re.search(r"Could not find '([^']+)'", text)):
        group, _, option = found.group(1).rpartition("/")
        options = re.findall(r"^\t(?!provider=)(.+)$", text, re.MULTILINE)
        if group.startswith("experiment/"):
            option, options = f"{group.removeprefix('experiment/')}/{option}", _experiments()
            group = "experiment"
        guess = nearest(option, options)
        return ConfigError(
            f"unknown {group or 'configuration'} {option!r}",
            why=f"known are {', '.join(options)}" if options else "there is no such file",
            fix=f"did you mean {group}={guess}?" if guess else f"choose one with {group}=NAME",
        )
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"cannot read the override {error.override!r}",
            why=_first_line(error),
            fix="overrides are KEY=VALUE; quote values with spaces or special characters: 'key=\"a b\"'",
        )
    if (found := re.search(r"Could not (?:override|delete) '([^']+)'", text)) or (
        found := re.search(r"Could not (?:append|delete)[^:]*: ?'?([\w.@/]+)", text)
    ):
        return _unknown_key(found.group(1), step, good)
    if isinstance(error, yaml.YAMLError):
        return ConfigError("bad YAML", where="the configuration", why=" ".join(str(error).split()), fix="mend the file")
    return ConfigError(
        f"bad override {override}" if override else "the configuration does not compose",
        why=" ".join(text.split("\n")[:2]),
        fix=f"see pocl {step or 'distill'} --cfg job",
    )


def _unknown_key(key: str, step: str | None, good: Sequence[str]) -> PoclError:
    known = sorted(_known_keys(step or "distill", good))
    section, _, leaf = key.rpartition(".")
    leaves = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in known}
    guess = (
        leaves.get(nearest(leaf, leaves, 0.6) or "")
        or nearest(key, known, 0.75)
        or anywhere.get(nearest(leaf, anywhere, 0.75) or "")
    )
    return ConfigError(
        f"unknown key {key!r}",
        where="the overrides",
        why="no part of the configuration has it",
        fix=f"did you mean {guess!r}?" if guess else f"see the keys with pocl {step or 'distill'} --cfg job",
    )


def _known_keys(step: str, overrides: Sequence[str]) -> set[str]:
    values = OmegaConf.to_container(compose(config_name=step, overrides=list(overrides)), resolve=False)
    assert isinstance(values, dict), "a composed configuration is a mapping"
    return set(_walk_keys(values))


def _experiments() -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return [*loader.get_group_options("experiment"), *(f"paper/{o}" for o in loader.get_group_options("experiment/paper"))]


def _walk_keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _walk_keys(value, f"{prefix}{key}.")
    elif isinstance(values, list | tuple):
        for item in values:
            yield from _walk_keys(item, prefix)


def _explain_validation(error: ValidationError, prefix: str, values: Mapping[str, Any]) -> list[PoclError]:
    """One error a key; the branches of a union are folded into one line."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        location = [str(part) for part in detail["loc"]]
        parts = [*([prefix] if prefix else []), *_keys_only(location, [prefix] if prefix else [], values, detail["type"])]
        by_key.setdefault(".".join(parts), []).append(detail)
    return [_validation_line(key, details, values) for key, details in by_key.items()]


def _keys_only(location: list[str], above: list[str], values: Any, kind: str) -> Iterator[str]:
    """The parts of a pydantic location that are keys of the configuration: union branches name types as well."""
    for part in above:
        values = values.get(part, {})
    for number, part in enumerate(location):
        last_missing = kind in ("missing", "missing_argument") and number == len(location) - 1
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list | tuple) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif not last_missing:
            continue
        yield part


def _validation_line(key: str, details: list[Any], values: Mapping[str, Any]) -> PoclError:
    first = details[0]
    kind, reason = first["type"], " or ".join(dict.fromkeys(detail["msg"] for detail in details))
    reason = reason.removeprefix("Value error, ")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        section, _, leaf = key.rpartition(".")
        siblings = _siblings(section)
        guess = nearest(leaf, siblings)
        return ConfigError(
            f"unknown key {key!r}",
            why=f"{section} has {', '.join(siblings)}" if siblings else "nothing reads it",
            fix=f"did you mean {section}.{guess}?" if guess else "remove it",
        )
    if kind in ("missing", "missing_argument"):
        return ConfigError(f"missing key {key!r}", why="it has no default here", fix=f"add {key}=…")
    if kind == "value_error":
        return ConfigError(f"contradiction in {key or 'the configuration'}", why=reason, fix=f"see {key.split('.')[0]} in --cfg job")
    shown = first["input"]
    return ConfigError(f"bad value {key}={shown!r}", why=reason[:1].lower() + reason[1:], fix=f"set {key}=… to an allowed value")


def _siblings(section: str) -> list[str]:
    model: Any = PoclConfig
    for part in section.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field is not None else None
    return sorted(getattr(model, "model_fields", {}))


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def user_config_folders() -> list[str]:
    """The folders of `POCL_CONFIG_PATH`, separated as in PATH."""
    return [folder for folder in os.environ.get("POCL_CONFIG_PATH", "").split(os.pathsep) if folder]
