"""The list `evaluation.datasets`: an entry is the name of a data set, a path, or a mapping with keys of `dataset`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_cli.errors import ConfigError, PoclError, nearest

# What an entry that is no name begins with: its keys are all there.
LOCAL = "local"


def named_datasets(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The options of the group `dataset` that `evaluation.datasets` is made from."""
    entries = _entries(values)
    asked = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if name == LOCAL or name in asked]


def with_datasets(
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


def _entries(values: Mapping[str, Any]) -> Sequence[Any]:
    evaluation = values.get("evaluation")
    entries = evaluation.get("datasets") if isinstance(evaluation, Mapping) else None
    return entries if isinstance(entries, list | tuple) else ()


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
