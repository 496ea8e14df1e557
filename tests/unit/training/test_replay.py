"""The share of the student's answers that follows the dev loss, and the buffer from which they serve again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_cli.losses.evolving import after_dev, after_step
from pocl_cli.losses.on_policy import REPLAY_ROWS, Part, num_replayable
from pocl_cli.registry import kd_methods
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.replay import Replay
from pocl_cli.training.rollout import Rollout
from pocl_cli.training.step import PartRows

from ...support.aborts import Aborted, abort_after
from ...support.splits import assert_any_split_is_the_same
from ...support.training import (
    RowsById,
    make_job,
    make_student,
    same_weights,
    toy_rows,
    train_lines,
    two_stages,
    weights,
)

# About every tenth token of the random student's answers.
ENDS = frozenset(range(0, 60, 7))
GOLD = toy_rows(12)


def distillm(**changes: Any) -> Any:
    return replace(make_student("distillm").method, **changes)  # type: ignore[type-var]


# ── the share ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_share_when_the_dev_loss_rises_then_does_too_from_the_loss_of_its_last_rise_on() -> None:
    method = distillm(share_start=0.75, share_step=0.125, tolerance=0.25)
    shares, state = [], {}
    for loss in (3.0, 3.125, 3.25, 3.375, 2.0, 3.5, 9.0, 99.0):
        state = after_dev(method, {"dev_cross_entropy": loss}, state)
        shares.append(float(state["student_share"]))
    assert shares == [0.75, 0.75, 0.875, 0.875, 0.875, 1.0, 1.0, 1.0]


def rows_of_steps(state: Any, progress: float, **changes: Any) -> dict[str, float]:
    """The shares of what 2,000 steps are made of."""
    method = distillm(**changes)
    parts = [method.rows_for_step(3, step, progress, state, 0.7) for step in range(2000)]
    assert {len(of_step) for of_step in parts} == {1}
    assert {part.kd_ratio for (part,) in parts if part.rows == "gold"} <= {0.7}
    assert {part.kd_ratio for (part,) in parts if part.rows != "gold"} <= {1.0}
    return {rows: count / 2000 for rows, count in Counter(part.rows for (part,) in parts).items()}


@pytest.mark.parametrize(
    ("held", "progress", "expected"),
    [
        (9, 0.0, {"gold": 0.4, "generated": 0.6}),
        (9, 0.75, {"gold": 0.4, "generated": 0.6}),
        (10, 0.0, {"gold": 0.4, "generated": 0.6}),
        (10, 0.75, {"gold": 0.4, "generated": 0.15, "replayed": 0.45}),
        (10, 1.0, {"gold": 0.4, "replayed": 0.6}),
    ],
)
def test_rows_when_the_share_is_given_then_are_new_the_less_the_later_once_the_buffer_is_full(
    held: int, progress: float, expected: dict[str, float]
) -> None:
    state = {"student_share": torch.tensor(0.6), REPLAY_ROWS: torch.zeros(held)}
    assert rows_of_steps(state, progress, buffer_size=10) == pytest.approx(expected, abs=0.04)


def test_rows_when_the_share_is_zero_then_are_gold_and_nothing_can_be_generated() -> None:
    assert rows_of_steps({}, 0.3, share_start=0.0) == {"gold": 1.0}
    assert distillm(share_start=0.0, share_step=0.1).generates
    never = distillm(share_start=0.0, share_step=0.0)
    assert (never.generates, never.needs_dev) == (False, False)


def test_state_when_the_base_has_one_then_is_kept_beside_share_and_buffer() -> None:
    taid = kd_methods.build(
        {
            "name": "taid",
            "schedule": "adaptive",
            "t_start": 0.4,
            "t_end": 1,
            "rate": 0.9,
            "momentum": 0,
            "t_squared": True,
        }
    )
    method, alone, state = distillm(base=taid), {}, {REPLAY_ROWS: torch.zeros(3)}
    for progress, loss in ((0.1, 2.0), (0.2, 1.0), (0.3, 0.5)):
        state = after_dev(method, {"dev_cross_entropy": loss}, state)
        state = after_step(method, progress, state, torch.tensor(loss))
        alone = after_step(taid, progress, alone, torch.tensor(loss))
    assert method.for_step(0.4, state) == taid.for_step(0.4, alone)
    assert num_replayable(state) == 3
    assert "student_share" in state


# ── the buffer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def buffer(size: int = 5) -> Replay:
    return Replay(RowsById(GOLD), size=size, seed=7, eos_token_ids={0})


def written(places: list[int], first: int) -> list[PartRows]:
    """Answers of different lengths to the rows of those places, beside a part that does not count."""
    rows = [
        replace(
            GOLD[place], response_ids=[first + number] * (1 + number) + [0] * (number % 2), response_cut=not number % 2
        )
        for number, place in enumerate(places)
    ]
    return [PartRows(Part("gold", 1.0), GOLD[:2]), PartRows(Part("generated", 1.0), rows)]


def test_buffer_when_answers_are_added_then_keeps_the_newest_and_gives_them_back_as_they_were() -> None:
    replay = buffer()
    first, second = written([0, 1, 2], 10), written([3, 0, 0], 20)
    state = replay.after(replay.after({"other": torch.ones(1)}, first), second)

    assert num_replayable(state) == 5
    assert torch.equal(state["other"], torch.ones(1))
    expected = [*first[1].rows[1:], *second[1].rows]
    drawn = replay.draw(state, 5, step=3)
    assert sorted(drawn, key=lambda row: row.response_ids[0]) == expected
    assert replay.after(state, [PartRows(Part("replayed", 1.0), drawn)]) is state


def test_draw_when_it_is_repeated_then_is_the_same_and_another_in_another_step() -> None:
    state = buffer().after({}, written([0, 1, 2, 3, 4], 10))
    drawn = buffer().draw(state, 3, step=3)
    assert drawn == buffer().draw(state, 3, step=3)
    assert len({row.response_ids[0] for row in drawn}) == 3
    assert any(drawn != buffer().draw(state, 3, step=step) for step in (4, 5, 6))


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_of(
    folder: Path, *, dtype: torch.dtype = torch.float64, dropout: float = 0.0, method: Any = None, **changes: Any
) -> TrainingJob:
    """Six answers fill the buffer, and any dev evaluation raises the share."""
    student = make_student("distillm", dtype=dtype, dropout=dropout)
    student.method = method or distillm(
        share_start=0.5, share_step=0.25, tolerance=0.0, buffer_size=6, max_new_tokens=8
    )
    job = make_job(folder, student=student, global_batch_size=3, evaluates=True, **changes)
    job = replace(job, evaluate_dev=rising(job.evaluate_dev))
    if not isinstance(job.rollout, Rollout):
        return job
    return replace(job, rollout=replace(job.rollout, eos_token_ids=ENDS))


def rising(evaluate: Callable[[int], dict[str, float]] | None) -> Callable[[int], dict[str, float]]:
    """The figures of a student whose cross entropy rises, whatever it does."""
    assert evaluate is not None

    def figures(stage: int) -> dict[str, float]:
        found = evaluate(stage)
        return {**found, "dev_cross_entropy": 100 - found["dev_cross_entropy"]}

    return figures


def test_run_when_its_share_stays_zero_then_is_that_of_its_skew_divergence(tmp_path: Path) -> None:
    for name, share_step in (("never", 0.0), ("not yet", 0.1)):
        method = distillm(share_step=share_step, tolerance=1e9)
        train(run_of(tmp_path / name, method=method, dtype=torch.float32, dropout=0.1))
    plain = run_of(tmp_path / "plain", method=make_student("sfkl").method, dtype=torch.float32, dropout=0.1)
    train(plain)

    keys = ("step", "loss", "ce", "kd", "grad_norm", "num_tokens")
    expected = [[line[key] for key in keys] for line in train_lines(tmp_path / "plain")]
    for name in ("never", "not yet"):
        assert [[line[key] for key in keys] for line in train_lines(tmp_path / name)] == expected


@pytest.mark.parametrize(("size", "parallel", "micro_batch"), [(1, "none", 1), (3, "ddp", 60), (2, "fsdp", 4096)])
def test_losses_and_gradient_norms_when_split_in_any_way_then_are_those_of_one_process(
    tmp_path: Path, size: int, parallel: str, micro_batch: int
) -> None:
    # A small rate: rounding must not choose other tokens.
    changes = {"stages": two_stages(GOLD, epochs=4), "lr": 1e-4}
    alone = assert_any_split_is_the_same(
        run_of, tmp_path, size=size, parallel=parallel, micro_batch=micro_batch, **changes
    )
    assert len(alone) > 20
    assert {bool(line["generated_rows"]) for line in alone} == {True, False}
    assert any(line.get("replayed_rows") for line in alone)
    assert alone[-1]["student_share"] == 1


def test_run_with_a_buffer_when_interrupted_then_ends_in_the_same_bytes(tmp_path: Path) -> None:
    def job(name: str) -> TrainingJob:
        return run_of(tmp_path / name, dtype=torch.float32, dropout=0.1, checkpoint_every=2, keep_best=True)

    def result(name: str) -> tuple[list[bytes], Any]:
        run = job(name)
        train(run)
        newest = max(path for path in (run.folder / "checkpoints").iterdir() if path.name[0].isdigit())
        files = [newest / "model.safetensors", newest / "method.safetensors", run.folder / "metrics.jsonl"]
        return [path.read_bytes() for path in files], weights(run.student)

    expected, expected_weights = result("undisturbed")
    kinds = [(bool(line["generated_rows"]), "replayed_rows" in line) for line in train_lines(tmp_path / "undisturbed")]
    assert set(kinds) == {(True, False), (False, True), (False, False)}
    assert len(kinds) > 8
    for step in (1, 2, 5, 8):
        with pytest.raises(Aborted):
            train(replace(job(str(step)), show=abort_after(step)))
        found, found_weights = result(str(step))
        assert found == expected
        assert same_weights(found_weights, expected_weights)
