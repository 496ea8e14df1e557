"""What is wrong with plain values, in our words: pydantic's errors as lines that name the nearest right key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

from pocl_cli.errors import ConfigError, PoclError, nearest
from pocl_cli.registry import Registry, difficulty_measurers, kd_methods, schedulers, trackers
from pocl_cli.schema import PoclConfig

FAMILIES: dict[str, Registry] = {
    "kd_method": kd_methods,
    "curriculum": schedulers,
    "difficulty": difficulty_measurers,
    "tracker": trackers,
}
# With one of these keys a mapping is a call to Hydra's `instantiate`.
CALL_KEYS = frozenset({"_target_", "_args_", "_partial_", "_convert_", "_recursive_"})
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class MultiConfigError(ConfigError):
    """Several mistakes, all shown at once, one line each."""

    def __init__(self, errors: Sequence[PoclError]) -> None:
        assert errors, "no error to show"
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = list(errors)
        self.exit_code = max(error.exit_code for error in errors)

    def __reduce__(self) -> tuple[object, ...]:
        return MultiConfigError, (self.errors,)


def explain_validation(
    error: ValidationError, values: Mapping[str, Any], above: tuple[str, ...] = ()
) -> list[PoclError]:
    """One error a key. The branches of a union, which pydantic reports one by one, share a line."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        location = (*above, *(str(part) for part in detail["loc"]))
        by_key.setdefault(".".join(_keys_only(location, values, detail["type"])), []).append(detail)
    return [_explained(key, details, values) for key, details in by_key.items()]


def _keys_only(location: Iterable[str], values: Any, kind: str) -> Iterator[str]:
    """The parts of a pydantic location that are keys of the configuration: for a union it holds names of types, too."""
    parts = tuple(location)
    for number, part in enumerate(parts):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list | tuple) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif not (kind in _MISSING and number == len(parts) - 1):
            continue
        yield part


def _explained(key: str, details: Sequence[Any], values: Mapping[str, Any]) -> PoclError:
    first = details[0]
    reasons = dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in details)
    why = " or ".join(reason[:1].lower() + reason[1:] for reason in reasons)
    if first["type"] in _UNKNOWN:
        return unknown_key(key, siblings_of(key, values))
    if first["type"] in _MISSING:
        return ConfigError(f"missing key {key!r}", why="it has no default here", fix=_addition(key, values))
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return ConfigError(f"section {key!r} contradicts itself", why=why, fix=f"see pocl STEP --cfg job -p {key}")
    return ConfigError(f"bad value {key}={_shown(first['input'])}", why=why, fix=_remedy(key, details))


def _addition(key: str, values: Mapping[str, Any]) -> str:
    section, _, leaf = key.partition(".")
    if not leaf and section in PoclConfig.model_fields:
        return f"choose one with {section}=NAME"
    if section in FAMILIES:
        return f"choose {section}={values[section]['name']}, whose file holds it, or add +{key}=VALUE"
    return f"add +{key}=VALUE"


def unknown_key(key: str, siblings: Sequence[str], anywhere: Iterable[str] = ()) -> ConfigError:
    """The error for a key that nothing reads; `siblings` are the keys of its section, `anywhere` those of all."""
    section, _, leaf = key.rpartition(".")
    why = f"{section} has {', '.join(siblings)}" if section and siblings else "nothing reads it"
    owners = _owners(section, leaf)
    if owners:
        fix = f"{section}={' and '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
    elif guess := nearest(leaf, siblings, 0.6):
        whole = f"{section}.{guess}" if section else guess
        fix = f"did you mean {whole!r}?"
    elif guess := _elsewhere(key, leaf, list(anywhere)):
        fix = f"did you mean {guess!r}?"
    else:
        fix = "remove it"
    return ConfigError(f"unknown key {key!r}", why=why, fix=fix)


def _owners(section: str, leaf: str) -> list[str]:
    """The members of a family that have a field which the chosen one lacks."""
    family = FAMILIES.get(section)
    return [name for name in family.names() if leaf in _fields(family.get(name))] if family else []


def _elsewhere(key: str, leaf: str, known: list[str]) -> str | None:
    """The key of another section that is meant: `trian.lr` is train.lr, `lr` is, too."""
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    near = nearest(key, known, 0.75)
    if near is not None and nearest(leaf, [near.rpartition(".")[2]], 0.6):
        return near
    return by_leaf.get(nearest(leaf, by_leaf, 0.75) or "")


def siblings_of(key: str, values: Mapping[str, Any]) -> list[str]:
    """The keys that the section of `key` may have, by the classes of the schema and of the chosen family members."""
    *path, _ = key.split(".")
    kind: Any = PoclConfig
    names = _fields(kind)
    for depth, part in enumerate(path):
        if depth == 0 and part in FAMILIES:
            kind = _chosen(part, values)
            names = ["name", *_fields(kind)]
        else:
            kind = _field_type(kind, part)
            names = _fields(kind)
    return sorted(names)


def _chosen(family: str, values: Mapping[str, Any]) -> type | None:
    section = values.get(family)
    name = section.get("name") if isinstance(section, Mapping) else None
    return FAMILIES[family].get(name) if name in FAMILIES[family].names() else None


def _fields(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _field_type(kind: Any, name: str) -> Any:
    """The type of a field (of an optional one without its None); of an entry, where `kind` is a tuple."""
    if get_origin(kind) is tuple and name.isdigit():
        kind = get_args(kind)[0]
        return next((one for one in get_args(kind) if _fields(one)), kind)
    found = get_type_hints(kind).get(name) if _fields(kind) else None
    sections = [one for one in get_args(found) if _fields(one)]
    return sections[0] if type(None) in get_args(found) and sections else found


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _remedy(key: str, details: Sequence[Any]) -> str:
    kinds = {detail["type"]: detail for detail in details}
    if "literal_error" in kinds:
        allowed = re.findall(r"'([^']+)'", kinds["literal_error"]["ctx"]["expected"])
        guess = nearest(str(details[0]["input"]), allowed)
        return f"did you mean {key}={guess}?" if guess else f"set {key} to one of {', '.join(allowed)}"
    if "string_type" in kinds and isinstance(details[0]["input"], int | float):
        return f"quote it, so that it is text: '{key}=\"{details[0]['input']}\"'"
    if "too_short" in kinds:
        return f"give {key} at least one entry"
    if set(kinds) == {"tuple_type"} and isinstance(details[0]["input"], str | int):
        return f"write a list: '{key}=[{details[0]['input']}]'"
    if any(kind.startswith("bool") for kind in kinds):
        return f"set {key} to true or false"
    bounds = [
        f"{_BOUNDS[name]} {limit}"
        for detail in details
        for name, limit in detail.get("ctx", {}).items()
        if name in _BOUNDS
    ]
    if bounds:
        return f"set {key} to a number {' or '.join(bounds)}"
    if any(kind.startswith("int") for kind in kinds):
        return f"set {key} to a whole number"
    return f"set {key} to {'a number' if any(kind.startswith('float') for kind in kinds) else 'one that is allowed'}"
