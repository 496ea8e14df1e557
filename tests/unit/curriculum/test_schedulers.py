"""The shipped training schedulers, and what every registered one promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pocl_cli.curriculum.selecting import selecting
from pocl_cli.errors import ConfigError
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import describe, schedulers

from ...support.subsets import make_subsets

ENDS = {"start": 1, "end": 1}
RULE = {"metric": "dev_rouge_l", "patience": 1, "min_epochs": 1}
MEMBERS = schedulers.names()
# Those whose stages are known beforehand.
PLANNED = [name for name in MEMBERS if name != "self_paced"]
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


def test_one_pass_when_default_then_each_stage_has_one_subset_and_the_run_has_the_passes_of_a_flat_one() -> None:
    subsets = make_subsets(_ids(11), 4)
    stages = _scheduler("one_pass")(subsets)
    assert [stage.record_ids for stage in stages] == [subset.record_ids for subset in subsets]
    assert sum(stage.epochs * len(stage.record_ids) for stage in stages) == 20 * 11


def test_reverse_when_default_then_is_baby_step_from_the_hard_end() -> None:
    subsets = make_subsets(_ids(12), 4)
    stages = _scheduler("reverse")(subsets)
    assert [stage.record_ids for stage in stages] == [tuple(_ids(12)[start:]) for start in (9, 6, 3, 0)]
    forward = _scheduler("baby_step")(subsets)
    assert [(s.epochs, s.temperature, s.kd_ratio) for s in stages] == [
        (s.epochs, s.temperature, s.kd_ratio) for s in forward
    ]


@pytest.mark.parametrize(
    ("pacing", "shares"),
    [("linear", [0.2, 0.4, 0.6, 0.8, 1.0]), ("root", [0.2, 0.28**0.5, 0.52**0.5, 0.76**0.5, 1.0])],
)
def test_competence_when_paced_then_each_stage_has_the_easiest_share(pacing: str, shares: list[float]) -> None:
    stages = _scheduler("competence", stages=5, pacing=pacing, initial=0.2)(make_subsets(_ids(1000), 5))
    for stage, share in zip(stages, shares, strict=True):
        assert stage.record_ids == tuple(_ids(1000)[: round(1000 * share)])


def test_competence_when_default_then_one_optimizer_and_schedule_run_through_about_twenty_passes() -> None:
    stages = _scheduler("competence")(make_subsets(_ids(1000), 10))
    assert not any(stage.restart_optimizer or stage.restart_lr for stage in stages)
    assert sum(stage.epochs * len(stage.record_ids) for stage in stages) == pytest.approx(20_000, rel=0.05)


@pytest.mark.parametrize(("pacing", "sizes"), [("linear", [2, 4, 7, 9]), ("root", [2, 6, 7, 9])])
def test_self_paced_when_a_stage_begins_then_has_the_share_that_the_student_finds_easiest(
    pacing: str, sizes: list[int]
) -> None:
    scheduler, ids = _scheduler("self_paced", pacing=pacing, initial=0.25), _ids(9)
    stages = scheduler([Subset(0, tuple(ids))])
    assert [len(stage.record_ids) for stage in stages] == sizes
    first = np.array([5.0, 1, 4, 4, 2, 9, 0, 4, 8])
    second = -first
    assert scheduler.rows_for_stage(stages[0], ids, first) == ("id1", "id6")
    assert scheduler.rows_for_stage(stages[0], ids, second) == ("id5", "id8")
    assert scheduler.rows_for_stage(stages[3], ids, first) == tuple(ids)


def test_self_paced_when_rows_are_equally_easy_then_those_of_lower_id_come_first_in_any_order() -> None:
    scheduler = _scheduler("self_paced", stages=2, initial=0.4)
    ids = ["e", "b", "d", "a", "c"]
    stage = scheduler([Subset(0, tuple(ids))])[0]
    assert scheduler.rows_for_stage(stage, ids, np.array([1.0, 3, 1, 1, 2])) == ("d", "a")
    assert scheduler.rows_for_stage(stage, ids[::-1], np.array([2.0, 1, 1, 3, 1])) == ("a", "d")


def test_self_paced_when_balanced_then_is_refused() -> None:
    with pytest.raises(ValidationError, match="exposure=balanced needs the rows of all stages beforehand"):
        _scheduler("self_paced", exposure="balanced")
    assert selecting(_scheduler("self_paced")) is not None
    assert [name for name in PLANNED if selecting(_scheduler(name)) is not None] == []


# ── what every registered scheduler promises ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MEMBERS)
@settings(deadline=None, max_examples=30)
@given(num_rows=st.integers(1, 60), num_stages=st.integers(1, 12))
def test_scheduler_when_any_partition_then_its_stages_are_sound(name: str, num_rows: int, num_stages: int) -> None:
    num_stages = min(num_rows, num_stages)
    scheduler = _scheduler(name, stages=num_stages)
    stages = scheduler(make_subsets(_ids(num_rows), num_stages))
    assert [stage.index for stage in stages] == list(range(num_stages))
    assert {record_id for stage in stages for record_id in stage.record_ids} == set(_ids(num_rows))
    for stage in stages:
        assert stage.record_ids
        assert len(set(stage.record_ids)) == len(stage.record_ids)
        assert stage.epochs == _values(name)["epochs_per_stage"]
        assert stage.times is None
    assert [stage.temperature for stage in stages] == scheduler.temperature.over(num_stages)
    assert [stage.kd_ratio for stage in stages] == scheduler.kd_ratio.over(num_stages)
    assert stages == scheduler(make_subsets(_ids(num_rows), num_stages))


@pytest.mark.parametrize("name", PLANNED)
@settings(deadline=None, max_examples=30)
@given(rows_per_subset=st.integers(1, 9), num_stages=st.integers(1, 12))
def test_scheduler_when_balanced_then_the_order_stays_and_all_rows_are_seen_equally_often(
    name: str, rows_per_subset: int, num_stages: int
) -> None:
    num_rows = rows_per_subset * num_stages
    subsets = make_subsets(_ids(num_rows), num_stages)
    plain, equal = (
        _scheduler(name, stages=num_stages)(subsets),
        _scheduler(name, stages=num_stages, exposure="balanced")(subsets),
    )
    assert [replace(stage, times=None) for stage in equal] == plain
    seen: Counter[str] = Counter()
    for stage in equal:
        assert stage.times is not None
        assert sum(stage.times) == stage.epochs * len(stage.record_ids)
        seen += Counter(dict(zip(stage.record_ids, stage.times, strict=True)))
    assert max(seen.values()) - min(seen[record_id] for record_id in _ids(num_rows)) <= 1


def test_balanced_when_a_stage_overdoes_its_rows_then_says_which() -> None:
    scheduler = _scheduler("baby_step", stages=2, epochs_per_stage=[9, 1], exposure="balanced")
    with pytest.raises(ConfigError, match=r"stage 0 sees.*36 draws, and its 4 rows.* 24 times.*5.5 times"):
        scheduler(make_subsets(_ids(8), 2))


@pytest.mark.parametrize("name", MEMBERS)
def test_scheduler_when_it_keeps_what_it_has_then_every_stage_says_so(name: str) -> None:
    scheduler = _scheduler(name, stages=3, restart_optimizer=False, restart_lr=True)
    stages = scheduler(make_subsets(_ids(9), 3))
    assert {(stage.restart_optimizer, stage.restart_lr) for stage in stages} == {(False, True)}


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


@pytest.mark.parametrize("name", MEMBERS)
def test_epochs_when_a_list_then_each_stage_has_its_own(name: str) -> None:
    stages = _scheduler(name, stages=3, epochs_per_stage=[5, 1, 2])(make_subsets(_ids(3), 3))
    assert [stage.epochs for stage in stages] == [5, 1, 2]


@pytest.mark.parametrize("name", MEMBERS)
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
        ({"pace": "root"}, ("pace",), "[Uu]nexpected"),
        (
            {"stages": 2, "temperature": {"start": 1, "end": 1, "values": [1, 2, 3]}},
            (),
            r"\[1.0, 2.0, 3.0\] has 3 numbers",
        ),
        (
            {"kd_ratio": {"start": 1, "end": 1, "values": [0.5, 2]}},
            ("kd_ratio", "values", 1),
            "less than or equal to 1",
        ),
        (
            {"kd_ratio": {"start": 1, "end": 1, "shape": "square"}},
            ("kd_ratio", "shape"),
            "'linear', 'step' or 'cosine'",
        ),
        ({"convergence": {**RULE, "min_epochs": 99}}, (), "min_epochs 99 is more than epochs_per_stage"),
        ({"convergence": {**RULE, "patient": 1}}, ("convergence", "patient"), "[Uu]nexpected"),
        ({"exposure": "equal"}, ("exposure",), "'epochs' or 'balanced'"),
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
    for name in MEMBERS:
        assert describe(_scheduler(name)) == _values(name)
