"""Keeps Hydra from running what configuration names: it builds loggers, callbacks and launchers from dotted paths.

The command line may set only Hydra's harmless keys. Files may set more, so every composition is looked through before
Hydra builds anything from it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from pocl_cli.errors import SecurityError
from pocl_cli.mistakes import CALL_KEYS

_ALLOWED = re.compile(
    r"(hydra/(launcher|sweeper)|hydra\.(launcher|sweeper|sweep)(\.[a-z]\w*)+|hydra\.run\.dir|hydra\.verbose)="
)
_ALLOWED_SHOWN = (
    "hydra/launcher, hydra/sweeper, hydra.launcher.*, hydra.sweeper.*, hydra.sweep.*, hydra.run.dir and hydra.verbose"
)
# Launchers and sweepers are Hydra's own or installed plugins; Hydra itself refuses other classes for them.
_PLUGIN = re.compile(r"hydra\._internal\.core_plugins\.|hydra_plugins\.")
_HANDLERS = {"logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"}
_STREAMS = {"ext://sys.stderr", "ext://sys.stdout"}
# Variables that decide which programs and libraries run.
_LOADERS = re.compile(r"hydra\.job\.env_set\.(PATH|LD_|DYLD_|PYTHON|GIT_|HYDRA_|BASH_ENV|ENV$)")
_DEEPEST = 20
_MOST_NODES = 100_000


def refuse_overrides(overrides: Sequence[str]) -> None:
    """Raises SecurityError at an override of Hydra's own configuration that could name code."""
    for override in overrides:
        key = override.partition("=")[0]
        if key.strip().lstrip("+~").startswith("hydra") and not _ALLOWED.match(override):
            raise _refused(key, "the command line", f"allowed are {_ALLOWED_SHOWN}")
        if key.startswith("hydra") and any(call in override for call in CALL_KEYS):
            raise _refused(override, "the command line", "leave it out")


def refuse_alias_bombs(folder: Path) -> None:
    """Raises SecurityError at a YAML file below `folder` whose aliases multiply to more than a machine can hold."""
    for path in sorted(folder.rglob("*.yaml")):
        with contextlib.suppress(OSError, yaml.YAMLError):  # Hydra tells of both, where it reads the file.
            text = path.read_bytes()
            if b"&" in text and b"*" in text and _expanded_size(yaml.compose(text, yaml.SafeLoader)) > _MOST_NODES:
                raise SecurityError(
                    "refused YAML aliases",
                    where=str(path),
                    why=f"written out they make more than {_MOST_NODES} values",
                    fix="write the values out, or leave them away",
                )


def _expanded_size(node: yaml.Node | None) -> float:
    """How many nodes a graph makes when every alias is written out: without end where one leads to itself."""
    sizes: dict[int, float] = {}

    def size(one: yaml.Node) -> float:
        if id(one) not in sizes:
            sizes[id(one)] = math.inf
            below = [part for pair in one.value for part in pair] if isinstance(one, yaml.MappingNode) else one.value
            sizes[id(one)] = 1 + (sum(map(size, below)) if isinstance(one, yaml.CollectionNode) else 0)
        return sizes[id(one)]

    return size(node) if node is not None else 0


def guard_compositions() -> None:
    """From now on no composition reaches Hydra's builders that names code: SecurityError.

    Hydra has no public hook between composing a configuration and building from it, so its loader is wrapped.
    """
    load = ConfigLoaderImpl.load_configuration
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def guarded(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = load(self, *args, **kwargs)
        refuse_code(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = guarded  # type: ignore[method-assign]


def refuse_code(cfg: DictConfig) -> None:
    """Raises SecurityError where the part of a composition that Hydra builds from names code."""
    if cfg.hydra.callbacks:
        raise _refused("hydra.callbacks", "the configuration", "remove it")
    if cfg.hydra.searchpath:
        raise _refused("hydra.searchpath", "the configuration", "name your folders in --config-dir or POCL_CONFIG_PATH")
    for section, path, key, value in _entries(cfg.hydra, ("hydra",)):
        is_plugin = path in ("hydra.launcher._target_", "hydra.sweeper._target_") and _PLUGIN.match(str(value))
        if (key in CALL_KEYS and not is_plugin) or _LOADERS.match(path):
            raise _refused(path, "the configuration", "remove it")
        if section.endswith("_logging") and _builds_a_logger(key, value):
            raise _refused(path, "the configuration", "remove it")


def _builds_a_logger(key: str, value: Any) -> bool:
    """Whether `logging.config` would import what an entry names: other than the usual handlers and streams."""
    if key in ("()", ".") or (key == "class" and value not in _HANDLERS):
        return True
    return isinstance(value, str) and "://" in value and value not in _STREAMS


def _entries(node: Any, above: tuple[str, ...]) -> Iterator[tuple[str, str, str, Any]]:
    """Section, dotted name, key and value of every entry below `node`, interpolations followed as Hydra will."""
    if len(above) > _DEEPEST:
        raise _refused(".".join(above), "the configuration", "untie the interpolations that lead in a circle")
    for key in list(node.keys()) if isinstance(node, DictConfig) else range(len(node)):
        try:
            value = node[key]
        except OmegaConfBaseException:
            continue  # What cannot be resolved cannot be built from either.
        path = (*above, str(key))
        yield path[1], ".".join(path), str(key), value
        if isinstance(value, DictConfig | ListConfig) and not value._is_none():
            yield from _entries(value, path)


def _refused(what: str, where: str, fix: str) -> SecurityError:
    return SecurityError(f"refused {what}", where=where, why="Hydra runs code that is named there", fix=fix)
