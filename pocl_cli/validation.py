"""From the plain values of a composed configuration to the frozen one; every mistake is found at once. No Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pocl_cli.contradictions import contradictions
from pocl_cli.dataset_list import with_datasets
from pocl_cli.errors import PoclError, SecurityError
from pocl_cli.mistakes import CALL_KEYS, FAMILIES, MultiConfigError, explain_validation
from pocl_cli.registry import describe
from pocl_cli.schema import PoclConfig
from pocl_cli.teacher_list import with_teachers


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
        presets: the values of those options that `named_datasets` asks for.
        teacher_names: the options of the group `teacher`.
        teacher_presets: the values of those options that `named_teachers` asks for.

    Raises:
        MultiConfigError: every mistake, nearest keys named.
    """
    errors: list[PoclError] = [_refused(path) for path in keys_of(values) if path.rpartition(".")[2] in CALL_KEYS]
    checked = {key: _without_calls(value) for key, value in values.items()}
    checked = with_datasets(checked, names, presets, errors)
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
            errors += contradictions(config, step)
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
