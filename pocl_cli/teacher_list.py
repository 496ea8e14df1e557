"""The list `teachers`, an entry a stage: the name of a teacher, a path, a mapping, or null for the composed one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl_cli.errors import ConfigError, PoclError, nearest

# What an entry that is no name begins with: its keys are all there.
NONE = "none"


def named_teachers(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The options of the group `teacher` that the entries are made from; `names` are all there are."""
    entries = _entries(values)
    asked = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if entries and (name == NONE or name in asked)]


def with_teachers(
    values: dict[str, Any],
    names: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    errors: list[PoclError],
) -> dict[str, Any]:
    """`values` with the entries of `teachers` as full mappings. For an entry that cannot be one, an error is added.

    Whether its hidden states are stored, an entry has from the section `teacher` unless it says so itself.
    """
    if not _entries(values):
        return values
    composed = values.get("teacher")
    shared = {"store": composed["store"]} if isinstance(composed, Mapping) and "store" in composed else {}
    teachers: list[Mapping[str, Any] | None] = []
    for index, entry in enumerate(_entries(values)):
        try:
            teachers.append(_teacher(entry, f"teachers.{index}", names, presets, shared))
        except PoclError as error:
            errors.append(error)
            teachers.append(None)  # keeps the places of the other entries
    return {**values, "teachers": teachers}


def _entries(values: Mapping[str, Any]) -> Sequence[Any]:
    entries = values.get("teachers")
    return entries if isinstance(entries, list | tuple) else ()


def _teacher(
    entry: Any,
    where: str,
    names: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> Mapping[str, Any] | None:
    if entry is None:
        return None
    if isinstance(entry, str) and entry in names and entry != NONE:
        return {**presets[entry], **shared}
    if isinstance(entry, str) and (re.search(r"[./\\~]", entry) or Path(entry).exists()):
        return {**presets[NONE], "name": _name_of(entry), "path": entry, **shared}
    if isinstance(entry, Mapping):
        named = entry.get("name")
        base = presets[named if isinstance(named, str) and named in names else NONE]
        if "name" not in entry:
            source = entry.get("path") or entry.get("experiment")
            base = {**base, "name": _name_of(source) if isinstance(source, str) else "unnamed"}
        return {**base, **shared, **{str(key): value for key, value in entry.items()}}
    known = ", ".join(name for name in names if name != NONE)
    guess = nearest(str(entry), [name for name in names if name != NONE])
    raise ConfigError(
        f"unknown teacher {entry!r}",
        where=where,
        why=f"an entry is one of {known}, a path, a mapping with keys of teacher, or null for the composed one",
        fix=f"did you mean {guess!r}?" if guess else "a path has a slash: ./my-teacher",
    )


def _name_of(source: str) -> str:
    return Path(source).name or "teacher"
