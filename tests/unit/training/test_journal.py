"""What a run writes down, and what a resumed one finds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pocl_cli.errors import ArtifactError, NonFiniteError
from pocl_cli.training.journal import CONSUMED, Journal
from pocl_cli.training.state import TrainingState

START = TrainingState()


def open_journal(folder: Path, state: TrainingState = START, tracked: list[Any] | None = None) -> Journal:
    def track(values: Mapping[str, Any], step: int) -> None:
        if tracked is not None:
            tracked.append((step, dict(values)))

    return Journal(folder, state, track=track)


def train_values(step: int, loss: float = 1.5) -> dict[str, Any]:
    return {"step": step, "stage": 0, "epoch": 0, "loss": loss, "ce": 1.0, "kd": 2.0, "grad_norm": 0.5}


def write_steps(journal: Journal, steps: range, flush_every: int = 1) -> int:
    size = 0
    for step in steps:
        journal.consumed([f"a{step}", f"b{step}"], stage=0, epoch=step // 4, step=step)
        journal.train_line(train_values(step), tokens_per_second=24.0)
        if step % flush_every == 0:
            size = journal.flush(step)
    return size


def test_lines_when_flushed_then_are_those_of_the_steps_without_a_clock_reading(tmp_path):
    tracked: list[Any] = []
    journal = open_journal(tmp_path, tracked=tracked)
    figures = {"dev_rouge_l": 20.0, "dev_cross_entropy": 2.0}

    journal.dev_line(figures, step=0, stage=0, epoch=0)
    journal.train_line(train_values(1), tokens_per_second=24.0)
    size = journal.flush(1)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "stage": 0, "epoch": 0, **figures}, train_values(1)]
    assert tracked == [(0, lines[0]), (1, lines[1])]
    assert size == (tmp_path / "metrics.jsonl").stat().st_size
    (timing,) = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert (timing["step"], timing["response_tokens_per_second"]) == (1, 24.0)


def test_lines_when_not_flushed_then_are_not_on_the_disk(tmp_path):
    journal = open_journal(tmp_path)

    journal.train_line(train_values(1), tokens_per_second=24.0)
    journal.consumed(["a"], stage=0, epoch=0, step=1)

    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "consumed").exists()


def test_journal_when_resumed_then_drops_what_was_flushed_after_the_checkpoint(tmp_path):
    whole, killed = open_journal(tmp_path / "whole"), open_journal(tmp_path / "killed")
    write_steps(whole, range(1, 6))
    size = write_steps(killed, range(1, 4))
    write_steps(killed, range(4, 6))  # flushed, but the checkpoint of step 3 is the newest

    resumed = open_journal(tmp_path / "killed", TrainingState(step=3, metrics_bytes=size))
    write_steps(resumed, range(4, 6), flush_every=5)  # at other steps than before

    whole.close()
    resumed.close()
    for name in ("metrics.jsonl", "consumed.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_journal_when_its_metrics_are_shorter_than_the_checkpoint_says_then_stops(tmp_path):
    size = write_steps(open_journal(tmp_path), range(1, 3))
    (tmp_path / "metrics.jsonl").write_bytes(b"")

    with pytest.raises(ArtifactError, match=r"metrics\.jsonl is damaged"):
        open_journal(tmp_path, TrainingState(step=2, metrics_bytes=size))


def test_consumed_when_closed_then_lists_stage_epoch_step_and_row_in_order(tmp_path):
    journal = open_journal(tmp_path)

    journal.consumed(["b", "a"], stage=0, epoch=1, step=1)
    journal.consumed(["c"], stage=1, epoch=0, step=2)
    journal.flush(2)
    journal.close()

    table = pq.read_table(tmp_path / "consumed.parquet")
    assert table.schema.equals(CONSUMED)
    assert [tuple(row.values()) for row in table.to_pylist()] == [(0, 1, 1, "b"), (0, 1, 1, "a"), (1, 0, 2, "c")]


def test_consumed_when_flushed_at_other_steps_then_has_the_same_bytes(tmp_path):
    for flush_every in (1, 3, 36):
        journal = open_journal(tmp_path / str(flush_every))
        write_steps(journal, range(1, 37), flush_every)
        journal.close()

    first, *others = [(tmp_path / name / "consumed.parquet").read_bytes() for name in ("1", "3", "36")]
    assert others == [first, first]


def test_journal_when_nothing_was_consumed_then_closes_with_an_empty_table(tmp_path):
    open_journal(tmp_path).close()

    assert pq.read_table(tmp_path / "consumed.parquet").num_rows == 0


def test_dev_line_when_a_figure_is_not_finite_then_stops_at_the_flush(tmp_path):
    journal = open_journal(tmp_path)
    journal.dev_line({"dev_rouge_l": 1.0, "dev_cross_entropy": float("nan")}, step=1, stage=0, epoch=1)

    with pytest.raises(NonFiniteError, match="dev_cross_entropy"):
        journal.flush(1)
