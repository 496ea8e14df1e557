from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from pocl_cli.errors import ConfigError
from pocl_cli.registry import Registry, describe, kd_methods, schedulers


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A family of a package with one module that has one member."""
    package = tmp_path / "shapes_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("shape", "shapes_of_a_test")

    @registry.register("circle")
    @dataclass(frozen=True, kw_only=True)
    class Circle:
        radius: Annotated[float, Field(gt=0)]

    yield registry
    for name in [name for name in sys.modules if name.startswith("shapes_of_a_test")]:
        del sys.modules[name]


def test_build_when_values_are_right_then_the_member_knows_its_name(family: Registry) -> None:
    circle = family.build({"name": "circle", "radius": 2})
    assert (circle.name, circle.radius) == ("circle", 2.0)
    assert describe(circle) == {"name": "circle", "radius": 2.0}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"radius": 0}, "greater_than"),
        ({}, "missing"),
        ({"radius": "x"}, "float_parsing"),
        ({"radius": 1, "colour": "red"}, "unexpected_keyword_argument"),
    ],
)
def test_build_when_a_field_is_wrong_then_pydantic_says_which(family: Registry, values: Any, kind: str) -> None:
    with pytest.raises(ValidationError) as caught:
        family.build({"name": "circle", **values})
    assert kind in {detail["type"] for detail in caught.value.errors()}


def test_build_when_the_name_is_unknown_then_the_nearest_is_named(family: Registry) -> None:
    with pytest.raises(ConfigError, match="unknown shape 'cirlce' — known are circle — did you mean 'circle'"):
        family.build({"name": "cirlce"})


@pytest.mark.parametrize("values", [None, {}, {"name": None}, {"name": ["circle"]}, "circle", 3])
def test_build_when_there_is_no_name_then_the_members_are_named(family: Registry, values: Any) -> None:
    with pytest.raises(ConfigError, match=r"no shape is chosen.*shape=NAME: circle"):
        family.build(values)


def test_names_when_a_module_is_added_to_the_package_then_its_member_is_found(family: Registry, tmp_path: Path) -> None:
    (tmp_path / "shapes_of_a_test" / "square.py").write_text(
        "from dataclasses import dataclass\n"
        "import shapes_of_a_test\n"
        "@shapes_of_a_test.registry.register('square')\n"
        "@dataclass(frozen=True)\n"
        "class Square: ...\n",
        encoding="utf-8",
    )
    import shapes_of_a_test  # type: ignore[import-not-found]

    shapes_of_a_test.registry = family
    assert family.names() == ["circle", "square"]


def test_register_when_a_name_is_taken_by_another_class_then_it_is_refused(family: Registry) -> None:
    @dataclass(frozen=True)
    class Other: ...

    with pytest.raises(AssertionError, match="registered twice"):
        family.register("circle")(Other)


def test_register_when_the_class_is_no_dataclass_then_it_is_refused(family: Registry) -> None:
    class Plain: ...

    with pytest.raises(AssertionError, match="must be a dataclass"):
        family.register("plain")(Plain)


def test_describe_when_a_member_holds_another_then_the_inner_one_is_named_too() -> None:
    """Forward and reverse KL have the same keys: without the name, two rankings would share an identity."""
    base = {"name": "rkl", "t_squared": True}
    values = {"name": "ranking", "base": base, "weight": 1.0, "top_k": 5}
    assert describe(kd_methods.build(values)) == values


def test_describe_when_a_member_holds_a_plain_dataclass_then_its_fields_are_plain_values() -> None:
    ramps = {"temperature": {"start": 1.0, "end": 2.0}, "kd_ratio": {"start": 0.7, "end": 1.0}}
    described = describe(schedulers.build({"name": "none", "stages": 2, "epochs_per_stage": 3, **ramps}))
    assert described["temperature"] == {"start": 1.0, "end": 2.0, "shape": "linear", "values": None}
    assert json.loads(json.dumps(described)) == described


def test_members_when_shipped_then_they_are_frozen() -> None:
    method = kd_methods.build({"name": "sfkl", "alpha": 0.1, "t_squared": True})
    with pytest.raises(AttributeError):
        method.alpha = 0.2
