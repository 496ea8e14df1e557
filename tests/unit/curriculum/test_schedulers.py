"""The shipped training schedulers, and what every registered one promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pocl_cli.records import Stage, Subset
from pocl_cli.registry import describe, schedulers

from ...support.subsets import make_subsets

CONF = Path(__file__).parents[3] / "conf" / "curriculum"


def _values(name: str, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")), **changes}


def _scheduler(name: str, **changes: Any) -> Any:
    return schedulers.build(_values(name, **changes))


def _ids(num_rows: int) -> list[str]:
    return [f"id{index}" for index in range(num_rows)]


def test_baby_step_when_default_then_has_the_papers_stages() -> None:
    stages = _scheduler("baby_step")(make_subsets(_ids(11), 4))
    assert [len(stage.record_ids) for stage in stages] == [2, 4, 6, 11]
    assert [stage.epochs for stage in stages] == [8, 8, 8, 8]
    assert [stage.temperature for stage in stages] == pytest.approx([1, 4 / 3, 5 / 3, 2], abs=1e-12)
    assert [stage.kd_ratio for stage in stages] == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-12)
    assert (stages[-1].temperature, stages[-1].kd_ratio) == (2.0, 1.0)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_baby_step_when_any_partition_then_each_stage_adds_the_next_subset(num_rows: int, num_stages: int) -> None:
    num_stages = min(num_rows, num_stages)
    subsets = make_subsets(_ids(num_rows), num_stages)
    stages = _scheduler("baby_step", stages=num_stages)(subsets)
    assert [stage.index for stage in stages] == list(range(num_stages))
    seen: tuple[str, ...] = ()
    for stage, subset in zip(stages, subsets, strict=True):
        seen += subset.record_ids
        assert stage.record_ids == seen
    assert seen == tuple(_ids(num_rows))


def test_baby_step_when_one_stage_then_trains_on_all_rows_at_the_ramps_end() -> None:
    [stage] = _scheduler("baby_step", stages=1)(make_subsets(_ids(5), 1))
    assert stage == Stage(0, tuple(_ids(5)), 8, 2.0, 1.0)


def test_baby_step_when_the_partition_is_of_other_stages_then_refuses() -> None:
    with pytest.raises(AssertionError, match="4 stages over a partition of 3 subsets"):
        _scheduler("baby_step")(make_subsets(_ids(9), 3))


def test_flat_when_default_then_is_one_plain_run() -> None:
    [stage] = _scheduler("none")([Subset(0, tuple(_ids(6)))])
    assert stage == Stage(0, tuple(_ids(6)), 20, 1.0, 1.0)
    assert not _scheduler("none").needs_partition
    assert _scheduler("baby_step").needs_partition


def test_flat_when_four_stages_with_ramps_then_differs_from_baby_step_in_the_rows_alone() -> None:
    subsets = make_subsets(_ids(10), 4)
    curriculum = _scheduler("baby_step")(subsets)
    ramps = {key: _values("baby_step")[key] for key in ("stages", "epochs_per_stage", "temperature", "kd_ratio")}
    control = _scheduler("none", **ramps)
    for of_rows in (subsets, [Subset(0, tuple(_ids(10)))]):
        stages = control(of_rows)
        assert [(s.epochs, s.temperature, s.kd_ratio) for s in stages] == [
            (s.epochs, s.temperature, s.kd_ratio) for s in curriculum
        ]
        assert {stage.record_ids for stage in stages} == {tuple(_ids(10))}


@pytest.mark.parametrize("name", ["baby_step", "none"])
def test_epochs_when_a_list_then_each_stage_has_its_own(name: str) -> None:
    stages = _scheduler(name, stages=3, epochs_per_stage=[5, 1, 2])(make_subsets(_ids(3), 3))
    assert [stage.epochs for stage in stages] == [5, 1, 2]


@pytest.mark.parametrize("name", ["baby_step", "none"])
@pytest.mark.parametrize(
    ("changes", "location", "complaint"),
    [
        ({"stages": 0}, ("stages",), "greater than or equal to 1"),
        ({"stages": 3, "epochs_per_stage": [5, 1]}, (), r"epochs_per_stage \[5, 1\] has 2 numbers for 3 stages"),
        ({"epochs_per_stage": []}, (), "has 0 numbers"),
        ({"epochs_per_stage": 0}, ("epochs_per_stage",), "at least 1 epoch, and epochs_per_stage is 0"),
        ({"stages": 2, "epochs_per_stage": [3, -1]}, ("epochs_per_stage",), r"at least 1 epoch.*\[3, -1\]"),
        ({"temperature": {"start": 0, "end": 1}}, ("temperature", "start"), "greater than 0"),
        ({"temperature": {"start": 1, "end": float("inf")}}, ("temperature", "end"), "finite"),
        ({"kd_ratio": {"start": 0.5, "end": 1.01}}, ("kd_ratio", "end"), "less than or equal to 1"),
        ({"kd_ratio": {"start": -0.1, "end": 1}}, ("kd_ratio", "start"), "greater than or equal to 0"),
        ({"kd_ratio": {"start": float("nan"), "end": 1}}, ("kd_ratio", "start"), "finite"),
        ({"kd_ratio": {"end": 1}}, ("kd_ratio", "start"), "required"),
        ({"kd_ratio": {"start": 0, "end": 1, "middle": 0.5}}, ("kd_ratio", "middle"), "[Uu]nexpected"),
        ({"pacing": "root"}, ("pacing",), "[Uu]nexpected"),
    ],
)
def test_configuration_when_wrong_then_is_refused_in_its_place(
    name: str, changes: dict[str, Any], location: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint) as raised:
        _scheduler(name, **changes)
    assert [error["loc"] for error in raised.value.errors()] == [location]


def test_configuration_when_wrong_in_several_places_then_all_are_told() -> None:
    wrong = _values("baby_step", stages=0, epochs_per_stage=0, kd_ratio={"start": 2, "end": 1})
    with pytest.raises(ValidationError) as raised:
        schedulers.build(wrong)
    assert len(raised.value.errors()) == 3


def test_describe_when_built_from_yaml_then_gives_the_yaml_back() -> None:
    for name in ("baby_step", "none"):
        assert describe(_scheduler(name)) == _values(name)
