"""Steps of every stage, known before the first."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.curriculum.learning_rate import learning_rates
from pocl_cli.curriculum.stage_table import StageRow, stage_steps, stage_table, steps_per_epoch
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import Stage
from pocl_cli.registry import schedulers

from ...support.subsets import make_subsets

CONF = Path(__file__).parents[3] / "conf" / "curriculum"


def _stages(name: str, num_rows: int) -> list[Stage]:
    scheduler = schedulers.build(yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")))
    stages: list[Stage] = scheduler(make_subsets([str(index) for index in range(num_rows)], scheduler.stages))
    return stages


def _table(
    stages: list[Stage], batch: int = 64, drop_last: bool = False, max_steps: int | None = None
) -> list[StageRow]:
    return stage_table(stages, global_batch_size=batch, drop_last=drop_last, lr=1e-4, lr_end=1e-6, max_steps=max_steps)


def _steps(rows: list[StageRow]) -> list[int]:
    return [row["steps"] for row in rows]


def test_table_when_the_papers_rows_then_has_its_steps() -> None:
    stages = _stages("baby_step", 11435)
    assert _steps(_table(stages)) == [360, 720, 1072, 1432]
    assert _steps(_table(stages, drop_last=True)) == [352, 712, 1064, 1424]
    assert sum(_steps(_table(_stages("none", 11435), drop_last=True))) == 3560


def test_table_when_made_then_has_the_keys_of_stages_json() -> None:
    [row] = _table(_stages("none", 100))
    assert row == {
        "stage": 0,
        "num_rows": 100,
        "epochs": 20,
        "steps": 40,
        "temperature": 1.0,
        "kd_ratio": 1.0,
        "lr": 1e-4,
    }


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (2, 1), (3, 2), (40, 20), (41, 21), (1000, 500)])
def test_max_steps_when_one_stage_then_makes_exactly_that_many(max_steps: int, epochs: int) -> None:
    [row] = _table(_stages("none", 100), max_steps=max_steps)
    assert (row["steps"], row["epochs"]) == (max_steps, epochs)


@pytest.mark.parametrize(
    ("max_steps", "steps", "epochs"),
    [
        (1, [1, 0, 0, 0], [1, 0, 0, 0]),
        (8, [8, 0, 0, 0], [8, 0, 0, 0]),
        (11, [8, 3, 0, 0], [8, 2, 0, 0]),
        (79, [8, 16, 24, 31], [8, 8, 8, 8]),
        (10_000, [8, 16, 24, 32], [8, 8, 8, 8]),
    ],
)
def test_max_steps_when_several_stages_then_stops_after_them(
    max_steps: int, steps: list[int], epochs: list[int]
) -> None:
    rows = _table(_stages("baby_step", 16), batch=4, max_steps=max_steps)
    assert (_steps(rows), [row["epochs"] for row in rows]) == (steps, epochs)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300), st.booleans())
def test_steps_per_epoch_when_any_size_then_covers_all_rows_or_all_but_a_partial_batch(
    num_rows: int, batch: int, drop_last: bool
) -> None:
    steps = steps_per_epoch(num_rows, batch, drop_last)
    if drop_last:
        assert steps * batch <= num_rows < (steps + 1) * batch
    else:
        assert (steps - 1) * batch < num_rows <= steps * batch


def test_stage_steps_when_a_limit_cuts_the_stage_then_still_gives_its_whole_length() -> None:
    stage = _stages("baby_step", 16)[3]
    assert stage_steps(stage, global_batch_size=4, drop_last=False) == 32


def test_table_when_dropping_leaves_no_batch_then_says_what_to_change() -> None:
    with pytest.raises(
        ConfigError, match=r"stage 0 would make no step in train.drop_last.*4 rows, a batch has 8"
    ) as raised:
        _table(_stages("baby_step", 16), batch=8, drop_last=True)
    assert raised.value.exit_code == 2
    assert _steps(_table(_stages("baby_step", 16), batch=8)) == [8, 8, 16, 16]


def test_table_when_a_stage_has_no_rows_then_is_the_datas_fault() -> None:
    with pytest.raises(DataError, match="stage 0"):
        _table([Stage(0, (), 1, 1.0, 1.0)])


def test_learning_rate_when_a_stage_keeps_the_schedule_then_starts_where_it_stands() -> None:
    kept = [replace(stage, restart_lr=False) for stage in _stages("baby_step", 16)]
    rows = _table(kept, batch=4)
    assert _steps(rows) == [8, 16, 24, 32]
    expected = [1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi * step / 80)) / 2 for step in (0, 8, 24, 48)]
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-12)
    assert [row["lr"] for row in _table(_stages("baby_step", 16), batch=4)] == [1e-4] * 4
    # A stop inside several stages does not shorten the schedule.
    assert [row["lr"] for row in _table(kept, batch=4, max_steps=10)] == [row["lr"] for row in rows]


def test_learning_rates_when_one_stage_restarts_then_the_others_share_theirs() -> None:
    stages = _stages("baby_step", 16)
    mixed = [replace(stage, restart_lr=stage.index == 2) for stage in stages]
    rates = learning_rates(mixed, [8, 16, 24, 32], start=1e-4, end=0.0)
    assert [(rate.num_steps, rate.before) for rate in rates] == [(24, 0), (24, 8), (56, 0), (56, 24)]
    alone = learning_rates(stages, [8, 16, 24, 32], start=1e-4, end=0.0)
    assert [(rate.num_steps, rate.before) for rate in alone] == [(8, 0), (16, 0), (24, 0), (32, 0)]
