"""From overrides to the checked configuration of a run, and to those of the recipes that make its models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pocl_cli.dataset_list import named_datasets
from pocl_cli.errors import ConfigError, PoclError
from pocl_cli.explain import COMPOSITION_ERRORS, diagnose, explain, options_of, unknown_option, unresolved
from pocl_cli.guard import refuse_alias_bombs
from pocl_cli.mistakes import MultiConfigError
from pocl_cli.redaction import scrub_values
from pocl_cli.run import Run
from pocl_cli.schema import PoclConfig
from pocl_cli.teacher_list import named_teachers
from pocl_cli.validation import validate

# What passes from a caller to the recipe that makes its teacher or student.
PASSED_ON = ("paths", "hardware", "tracker", "upstream")


@dataclass
class _Composed:
    """What has been composed beside the configuration itself: a sweep asks for the same again and again."""

    presets: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    recipes: dict[tuple[str, ...], Run] = field(default_factory=dict)


_composed: WeakKeyDictionary[ConfigLoader, _Composed] = WeakKeyDictionary()


def _known() -> _Composed:
    """What has been composed from the folders that Hydra reads now."""
    return _composed.setdefault(GlobalHydra.instance().config_loader(), _Composed())


# ── where configuration is read ───────────────────────────────────────────────────────────────────────────────────────


def conf_dir() -> Path:
    """The shipped configuration: inside the package in a wheel, at the repository's top in an editable install."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


class _UserConfigPath(SearchPathPlugin):
    """Puts a user's folders before the shipped ones, so that they can shadow them: Hydra's own --config-dir cannot."""

    folders: tuple[str, ...] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.folders):
            search_path.prepend("user", f"file://{folder}")


def user_config_folders() -> list[str]:
    """The folders of `POCL_CONFIG_PATH`, separated as in PATH."""
    return [folder for folder in os.environ.get("POCL_CONFIG_PATH", "").split(os.pathsep) if folder]


def add_user_config(folders: Iterable[str]) -> None:
    """Makes a user's own YAML folders, the first before the others, part of every composition from now on.

    Raises MultiConfigError where one does not exist, and SecurityError where a file in it would fill the memory.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    missing = [
        ConfigError(
            f"no configuration folder {path}",
            why="--config-dir and POCL_CONFIG_PATH name existing folders",
            fix="create it, with a sub-folder a group (kd_method, experiment, …)",
        )
        for path in paths
        if not path.is_dir()
    ]
    if missing:
        raise MultiConfigError(missing)
    for path in paths:
        refuse_alias_bombs(path)
    _UserConfigPath.folders = tuple(str(path) for path in paths)
    Plugins.instance().register(_UserConfigPath)


# ── composing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def compose_run(
    step: str,
    overrides: Sequence[str],
    *,
    config_name: str | None = None,
    options: Sequence[str] = (),
    above: tuple[str, ...] = (),
) -> Run:
    """Composes and checks a configuration inside an initialised Hydra. Raises MultiConfigError with every mistake."""
    try:
        cfg = compose(config_name or step, overrides=list(overrides))
    except COMPOSITION_ERRORS as error:
        errors, _ = diagnose(config_name or step, overrides, sweeps=False)
        raise MultiConfigError(errors or [explain(error)]) from error
    return from_hydra(step, cfg, overrides, options=options, above=above)


def from_hydra(
    step: str,
    cfg: DictConfig,
    overrides: Sequence[str],
    *,
    options: Sequence[str] = (),
    above: tuple[str, ...] = (),
) -> Run:
    """Checks what Hydra composed, and the recipes that it names. Raises MultiConfigError with every mistake found.

    Args:
        step: the command that it is for.
        cfg: the composed configuration, without Hydra's own part.
        overrides: as typed.
        options: see `Run`.
        above: the recipes that need this one.
    """
    values = _plain(cfg)
    if values.pop("experiment", None) is not None:
        raise MultiConfigError(
            [
                ConfigError(
                    "the experiment sets nothing",
                    why="without a package its keys are read as experiment.*",
                    fix="let its file begin with the line '# @package _global_'",
                )
            ]
        )
    config = validate(
        values,
        step,
        names=options_of("dataset"),
        presets=_presets("dataset", named_datasets(values, options_of("dataset"))),
        teacher_names=options_of("teacher"),
        teacher_presets=_presets("teacher", named_teachers(values, options_of("teacher"))),
    )
    options = tuple(options)
    recipes = _recipes(config, overrides, options, above)
    return Run(step, config, tuple(overrides), scrub_values(values), options, recipes)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise MultiConfigError(unresolved(cfg) or [explain(error)]) from error
    assert isinstance(values, dict), "a composed configuration is a mapping"
    return {str(key): value for key, value in values.items()}


def _presets(group: str, names: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """Options of a group (those of `dataset` that `evaluation.datasets` needs), composed all at once."""
    known = _known().presets.setdefault(group, {})
    needed = [name for name in names if name not in known]
    if needed:
        try:
            composed = compose(overrides=[f"+{group}@preset_{i}={name}" for i, name in enumerate(needed)])
        except COMPOSITION_ERRORS as error:
            raise MultiConfigError([explain(error)]) from error
        known |= {name: _plain(composed[f"preset_{i}"]) for i, name in enumerate(needed)}
    return known


# ── recipes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _recipes(
    config: PoclConfig, overrides: Sequence[str], options: tuple[str, ...], above: tuple[str, ...]
) -> dict[tuple[str, tuple[str, ...]], Run]:
    """The runs of every model's `experiment`, each composed from its recipe alone."""
    passed = [word for word in overrides if section_of(word) in PASSED_ON]
    folders = [word for word in options if word.startswith("--config-dir")]
    known = options_of("experiment")
    runs: dict[tuple[str, tuple[str, ...]], Run] = {}
    errors: list[PoclError] = []
    teachers = [(f"teachers.{index}", model) for index, model in enumerate(config.teachers)]
    for part, model in (("teacher", config.teacher), ("student", config.student), *teachers):
        name = model.experiment if model is not None else None
        if model is None or name is None:
            continue
        if name not in known:
            errors.append(unknown_option(f"{part}.experiment", name, known))
            continue
        if name in above:
            chain = " → ".join([*above, name])
            errors.append(
                ConfigError(f"the recipe {name!r} needs itself", why=chain, fix=f"give {part}.path in one of them")
            )
            continue
        try:
            words = (f"experiment={name}", *passed, *model.overrides)
            made = _known().recipes
            if words not in made:
                made[words] = compose_run("distill", words, options=folders, above=(*above, name))
            runs[name, model.overrides] = made[words]
        except PoclError as error:
            errors += [_inside(one, part, name) for one in getattr(error, "errors", [error])]
    if errors:
        raise MultiConfigError(errors)
    return runs


def _inside(error: PoclError, part: str, name: str) -> PoclError:
    where = f"{part}.experiment={name}" + (f", {error.where}" if error.where else "")
    return type(error)(error.what, where=where, why=error.why, fix=error.fix)


def section_of(override: str) -> str:
    """The section or group that an override belongs to."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
