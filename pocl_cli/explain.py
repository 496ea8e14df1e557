"""Hydra's composition errors in our words, and all of them at once: Hydra itself stops at the first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import yaml
from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pocl_cli.errors import ConfigError, PoclError, SecurityError, nearest
from pocl_cli.mistakes import siblings_of, unknown_key
from pocl_cli.validation import keys_of

# What composing raises at a user's mistake.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
# Groups whose options are often mistaken for the path of a model or of a data set.
_PATHS = {"teacher": "teacher.path={}", "student": "student.path={}", "dataset": "dataset=local dataset.path={}"}

# The options of each group in the folders that Hydra reads; a new Hydra may read others.
_listed: WeakKeyDictionary[ConfigLoader, dict[str, list[str]]] = WeakKeyDictionary()

# What our examples of launchers rest on, and the extra of this package that brings it.
_EXTRAS = {"hydra/launcher/joblib": "joblib", "hydra/launcher/submitit_slurm": "slurm"}


def diagnose(config_name: str, overrides: Sequence[str], *, sweeps: bool) -> tuple[list[PoclError], DictConfig | None]:
    """Inside an initialised Hydra: every override that does not compose, explained, and what the others compose to.

    A sweep (`kd_method=fkl,rkl`) is judged by all its choices, and composed with its first; where no `sweeps` are
    meant, it is a mistake. None where a file does not compose.
    """
    errors: list[PoclError] = []
    groups: list[str] = []
    keys: list[Override] = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            errors.append(_unreadable(text, error))
            continue
        override.input_line = text
        if override.is_hydra_override() and "/" not in override.key_or_group:
            groups.append(text)
            continue
        if override.is_sweep_override() and not sweeps:
            errors.append(_several_values(text))
        options = options_of(override.key_or_group)
        if misplaced := _misplaced(override, options):
            errors.append(misplaced)
        elif not options:
            keys.append(override)
        elif wrong := [one for one in _choices(override) if one not in options]:
            errors += [unknown_option(override.key_or_group, one, options) for one in wrong]
        else:
            groups.append(_first(override))
    try:
        base = compose(config_name, overrides=groups)
    except COMPOSITION_ERRORS as error:
        return [*errors, explain(error)], None
    values: Any = OmegaConf.to_container(base, resolve=False)
    mistakes = [_key_mistake(override, base, values) for override in keys]
    errors += [mistake for mistake in mistakes if mistake is not None]
    good = [_first(override) for override, mistake in zip(keys, mistakes, strict=True) if mistake is None]
    more, cfg = _composed(config_name, groups, good)
    return errors + more, cfg


def _composed(config_name: str, groups: list[str], keys: list[str]) -> tuple[list[PoclError], DictConfig | None]:
    """What all overrides compose to, less those that Hydra refuses for reasons that only composing shows."""
    try:
        return [], compose(config_name, overrides=[*groups, *keys])
    except COMPOSITION_ERRORS as all_together:
        errors, good = [], []
        for key in keys:
            try:
                compose(config_name, overrides=[*groups, key])
                good.append(key)
            except COMPOSITION_ERRORS as error:
                errors.append(explain(error, key))
        if not errors:
            return [explain(all_together)], None
        return errors, compose(config_name, overrides=[*groups, *good])


def options_of(group: str) -> list[str]:
    """The options of a group, those of its sub-groups among them (`paper/gpt2_fkl`). Hydra lists each group once."""
    loader = GlobalHydra.instance().config_loader()
    listed = _listed.setdefault(loader, {})
    if group not in listed:
        own = loader.get_group_options(group, ObjectType.CONFIG)
        below = loader.get_group_options(group, ObjectType.GROUP) if own else []
        listed[group] = sorted(
            [*own, *(f"{name}/{option}" for name in below for option in options_of(f"{group}/{name}"))]
        )
    return listed[group]


def _choices(override: Override) -> list[str]:
    """What a group override chooses: one option, several of a sweep or a list, or nothing (`null`, `~group`)."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    value = override.value()
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]


def _first(override: Override) -> str:
    assert override.input_line is not None, "set when it was read"
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return override.input_line
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


# ── one mistake, one line ─────────────────────────────────────────────────────────────────────────────────────────────


def _unreadable(text: str, error: HydraException) -> ConfigError:
    key, equals, value = text.partition("=")
    if not equals:
        fix = f"write {key}=VALUE"
    elif re.fullmatch(r"[+~]{0,2}[\w./@-]+", key):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        fix = f"quote the value: '{key}=\"{quoted}\"'"
    else:
        fix = "a key has letters, digits, '_', '.', '/' and '@' only; an entry of a list is KEY.0"
    return ConfigError(f"cannot read the override {text!r}", why=_first_line(error), fix=fix)


def unknown_option(group: str, option: str, options: Sequence[str]) -> ConfigError:
    """The error for an option that a group does not have; a path in its place is recognised."""
    guess = nearest(option, options) or nearest(option, [name.rpartition("/")[2] for name in options])
    guess = next((name for name in options if guess and name.rpartition("/")[2] == guess), guess)
    if group in _PATHS and ("/" in option or Path(option).exists()):
        fix = f"a path or hub id is given with {_PATHS[group].format(option)}"
    elif group == "hydra/launcher":
        fix = f"install the plugin that brings it: pip install hydra-{option.partition('_')[0]}-launcher"
    else:
        fix = f"did you mean {group}={guess}?" if guess else f"choose one with {group}=NAME"
    return ConfigError(f"unknown {group} {option!r}", why=f"known are {', '.join(options)}", fix=fix)


def _misplaced(override: Override, options: Sequence[str]) -> ConfigError | None:
    """A choice of an option that is none, or is written so that Hydra looks for it elsewhere."""
    group, line = override.key_or_group, str(override.input_line)
    if override.package is not None and not override.is_add():
        why = "every option has its place already"
        return ConfigError(f"unknown key '{group}@{override.package}'", why=why, fix=f"write {group}=…, without @")
    if options and override.is_add() and override.package is None and group in _groups():
        return ConfigError(f"{line!r} adds a group that is there", why="+ is for new ones", fix=f"write {line[1:]}")
    if options and not override.is_delete() and override.value() is None:
        fix = f"choose one of {', '.join(options)}, or leave {group} out"
        return ConfigError(f"{line!r} chooses nothing", why=f"{group} needs an option", fix=fix)
    return None


def _key_mistake(override: Override, base: DictConfig, values: Mapping[str, Any]) -> PoclError | None:
    """What is wrong with the key of an override, judged by what the chosen options compose to."""
    key, line = override.key_or_group, override.input_line
    known = set(keys_of(values))
    head, _, last = key.rpartition(".")
    parent = OmegaConf.select(base, head) if head in known else None
    exists = key in known or (isinstance(parent, ListConfig) and last.isdigit() and int(last) < len(parent))
    if override.is_add() and exists and not isinstance(override.value(), dict | list):
        return ConfigError(f"{line!r} adds a key that exists", why="+ is for new keys", fix=f"write {str(line)[1:]}")
    if override.is_add() or override.is_force_add() or exists:
        return None  # Whether anything reads a new key is for the schema to say.
    if isinstance(parent, ListConfig):
        return ConfigError(
            f"unknown key {key!r}", why=f"{head} has {len(parent)} entries, counted from 0", fix=f"write {head}=[…]"
        )
    return unknown_key(key, siblings_of(key, values), anywhere=[*known, *_groups()])


def _groups() -> list[str]:
    names = GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)
    return [name for name in names if name != "hydra"]


def explain(error: Exception, override: str | None = None) -> PoclError:
    """A composition error of a file, or of one override, in our words."""
    text = str(error)
    inside = re.match(r"In '([^']+)': ", text)
    where = f"conf/{inside.group(1)}.yaml" if inside else None
    if isinstance(error, yaml.YAMLError):
        return _bad_yaml(error)
    if isinstance(error, MissingConfigException):
        return _missing_file(error, where)
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return _several_values(found.group(1))
    if found := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        guess = nearest(found.group(1), _groups())
        fix = f"did you mean {guess!r}?" if guess else f"the groups are {', '.join(_groups())}"
        return ConfigError(f"unknown group {found.group(1)!r}", where=where, why="the defaults have none", fix=fix)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = str(error.__cause__)
    return ConfigError(
        f"bad override {override!r}" if override else "the configuration does not compose",
        where=where,
        why=" ".join(text.split("\n")[:2]),
        fix="see pocl STEP --cfg job for the keys and their types",
    )


def _bad_yaml(error: yaml.YAMLError) -> PoclError:
    why = " ".join(str(error).split())
    if "tag:yaml.org,2002:python" in why:
        return SecurityError("refused YAML tag", why=why, fix="remove the tag: configuration never names code to run")
    return ConfigError("bad YAML", why=why, fix="mend the file")


def _missing_file(error: MissingConfigException, where: str | None) -> ConfigError:
    found = re.search(r"Could not find '([^']+)'", str(error))
    path = found.group(1) if found else str(error.missing_cfg_file)
    # Our groups have options in sub-folders (experiment=paper/x), Hydra's have sub-groups (hydra/launcher=x).
    if path in _EXTRAS:
        fix = f"pip install 'pocl-cli[{_EXTRAS[path]}]'"
        return ConfigError(f"no launcher {path.rpartition('/')[2]}", why="its package is not installed", fix=fix)
    group, _, option = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    if group and (options := options_of(group)):
        return unknown_option(group, option, options)
    return ConfigError(
        f"no configuration file {path}",
        where=where,
        why="it is neither in the shipped conf/ nor in a folder of --config-dir or POCL_CONFIG_PATH",
        fix="check its name and --config-dir",
    )


def _several_values(override: str) -> ConfigError:
    key, _, value = override.partition("=")
    return ConfigError(
        f"several values in {override!r}",
        why="they make a sweep",
        fix=f"run it with -m, or write a list: '{key}=[{value}]', or quote the comma: '{key}=\"{value}\"'",
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def unresolved(cfg: Any) -> list[PoclError]:
    """Every key whose interpolation leads nowhere, or that has no value (`???`)."""
    errors: list[PoclError] = []
    for key in keys_of(OmegaConf.to_container(cfg, resolve=False)):
        try:
            OmegaConf.select(cfg, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            why = _first_line(error)
            errors.append(ConfigError(f"{key} has no value", why=why, fix=f"give it one: {key}=VALUE"))
    return errors
