"""The audit of what was consumed: silent for every scheduler, and loud for each kind of difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from pocl_cli.curriculum.audit import StageAudit, audit
from pocl_cli.curriculum.stage_table import StageRow, stage_table
from pocl_cli.errors import ArtifactError
from pocl_cli.records import Stage, Subset
from pocl_cli.registry import schedulers
from pocl_cli.training.journal import CONSUMED
from pocl_cli.training.sampler import Sampler

from ...support.subsets import make_subsets, with_exposure

CONF = Path(__file__).parents[3] / "conf" / "curriculum"
IDS = [f"id{index:02d}" for index in range(24)]
BATCH = 5

Draws = list[dict[str, Any]]


def planned(name: str, *, drop_last: bool = False, max_steps: int | None = None, **changes: Any) -> tuple[Any, ...]:
    """Stages over three subsets, two epochs each, their table and the partition."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    if "initial" in values:
        values["initial"] = 0.3  # the first stage has a whole batch
    subsets = make_subsets(IDS, 3)
    stages = schedulers.build({**values, "stages": 3, "epochs_per_stage": 2, **changes})(subsets)
    table = stage_table(stages, global_batch_size=BATCH, drop_last=drop_last, lr=1e-3, lr_end=1e-4, max_steps=max_steps)
    return stages, table, subsets, drop_last


def drawn(stages: list[Stage], table: list[StageRow], drop_last: bool) -> Draws:
    """What the loop notes down."""
    draws, step = [], 0
    for stage, row in zip(stages, table, strict=True):
        sampler = Sampler(stage, seed=3, global_batch_size=BATCH, drop_last=drop_last)
        for stage_step in range(row["steps"]):
            step += 1
            draws += [
                {"stage": stage.index, "epoch": sampler.epoch(stage_step), "step": step, "id": record_id}
                for record_id in sampler.global_batch(stage_step)
            ]
    return draws


def audited(
    draws: Draws, stages: list[Stage], table: list[StageRow], subsets: list[Subset], drop_last: bool
) -> list[StageAudit]:
    consumed = pa.Table.from_pylist(draws, schema=CONSUMED)
    return audit(consumed, stages, table, subsets, global_batch_size=BATCH, drop_last=drop_last)


@pytest.mark.parametrize("max_steps", [None, 3, 12])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("name", "exposure"), with_exposure())
def test_audit_when_the_sampler_kept_to_the_table_then_says_what_each_stage_used(
    name: str, exposure: str, drop_last: bool, max_steps: int | None
) -> None:
    stages, table, subsets, _ = planned(name, exposure=exposure, drop_last=drop_last, max_steps=max_steps)
    found = audited(drawn(stages, table, drop_last), stages, table, subsets, drop_last)
    assert [(one["stage"], one["steps"]) for one in found] == [(r["stage"], r["steps"]) for r in table if r["steps"]]
    if exposure == "epochs" and not drop_last and max_steps is None:
        assert [one["times"] for one in found] == [[2, 2]] * 3
        assert [one["num_rows"] for one in found] == [len(stage.record_ids) for stage in stages]


def test_audit_when_the_curriculum_is_baby_step_then_stage_k_used_exactly_the_subsets_up_to_k() -> None:
    stages, table, subsets, drop_last = planned("baby_step")
    assert audited(drawn(stages, table, drop_last), stages, table, subsets, drop_last) == [
        {"stage": 0, "steps": 4, "subsets": [0], "num_rows": 8, "times": [2, 2]},
        {"stage": 1, "steps": 8, "subsets": [0, 1], "num_rows": 16, "times": [2, 2]},
        {"stage": 2, "steps": 10, "subsets": [0, 1, 2], "num_rows": 24, "times": [2, 2]},
    ]


def change(place: int, **values: Any) -> Callable[[Draws], Draws]:
    return lambda draws: [*draws[:place], {**draws[place], **values}, *draws[place + 1 :]]


def swapped(draws: Draws) -> Draws:
    """Two rows of stage 0 in each other's epoch: every row is still seen as often as it should be."""
    other = next(place for place in range(8, 16) if draws[place]["id"] != draws[0]["id"])
    return change(other, id=draws[0]["id"])(change(0, id=draws[other]["id"])(draws))


def repeated(draws: Draws) -> Draws:
    """A row instead of another one, in another epoch than its own."""
    return change(0, id=draws[1]["id"])(draws)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda draws: draws[:-1], r"step 22 has 3 rows, where the table says 4"),
        (lambda draws: draws[:-4], r"step 22 has 0 rows, where the table says 4"),
        (lambda draws: [*draws, {**draws[-1], "step": 23}], r"step 23 has 1 rows, where the table says 0"),
        (lambda draws: draws[5:], r"step 1 has 0 rows, where the table says 5"),
        (change(3, step=2), r"step 1 has 4 rows, where the table says 5"),
        (change(0, stage=1), r"row 0 of the file \(step 1\) is of stage 1, where the table says 0"),
        (change(20, epoch=1), r"row 20 of the file \(step 5\) is of epoch 1, where the table says 0"),
        (lambda draws: [draws[5], *draws[1:5], draws[0], *draws[6:]], r"row 0 of the file .* is of step 2"),
        (change(0, id="stranger"), r"1 draws are of rows outside the partition: stranger"),
        (change(0, id=IDS[9]), r"stage 0 saw 1 rows of other stages \(subsets \[1\]\): id09"),
        (repeated, r"stage 0 saw a row twice in one epoch"),
        (swapped, r"stage 0 saw a row twice in one epoch"),
    ],
)
def test_audit_when_something_differs_from_the_table_then_says_where(
    spoil: Callable[[Draws], Draws], complaint: str
) -> None:
    stages, table, subsets, drop_last = planned("baby_step")
    spoiled = spoil(drawn(stages, table, drop_last))
    with pytest.raises(ArtifactError, match=complaint) as raised:
        audited(spoiled, stages, table, subsets, drop_last)
    assert raised.value.exit_code == 4


def test_audit_when_a_balanced_row_is_seen_too_often_then_says_how_often_it_should_be() -> None:
    stages, table, subsets, drop_last = planned("baby_step", exposure="balanced")
    draws = drawn(stages, table, drop_last)
    other = next(draw["id"] for draw in draws if draw["id"] != draws[0]["id"])
    with pytest.raises(ArtifactError, match=r"stage 0 saw 2 of its rows too often or.*the table says 2"):
        audited(change(0, id=other)(draws), stages, table, subsets, drop_last)


def test_audit_when_a_stage_has_other_rows_than_were_consumed_then_differs() -> None:
    stages, table, subsets, drop_last = planned("baby_step")
    draws = drawn(stages, table, drop_last)
    turned = [replace(stages[0], record_ids=subsets[2].record_ids), *stages[1:]]
    with pytest.raises(ArtifactError, match=r"stage 0 saw 8 rows of other stages \(subsets \[0\]\)"):
        audited(draws, turned, table, subsets, drop_last)
