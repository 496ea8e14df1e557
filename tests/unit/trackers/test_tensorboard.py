from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pocl_cli.registry import trackers

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

CONFIG = {"train": {"seed": 10}, "hub_token": "hunter2"}


def log_steps(run_folder: Path, steps: Mapping[int, Mapping[str, Any]]) -> None:
    tracker = trackers.build({"name": "tensorboard"})
    tracker.check()
    with tracker.open(run_folder, "run", CONFIG) as run:
        for step, values in steps.items():
            run.log({"step": step, **values}, step)


def read(run_folder: Path) -> Any:
    events = event_accumulator.EventAccumulator(str(run_folder / "tensorboard"))
    return events.Reload()


def test_tensorboard_when_steps_are_logged_then_the_event_file_holds_them(tmp_path: Path) -> None:
    log_steps(tmp_path, {1: {"loss": 2.5, "note": "x"}, 2: {"loss": 1.5, "dev_rouge_l": 20.0}})
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["loss", "dev_rouge_l"]
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [(point.step, point.value) for point in events.Scalars("dev_rouge_l")] == [(2, 20.0)]


def test_tensorboard_when_a_resumed_run_repeats_steps_then_each_step_is_shown_once(tmp_path: Path) -> None:
    log_steps(tmp_path, {step: {"loss": 10.0 - step} for step in (1, 2, 3)})
    log_steps(tmp_path, {step: {"loss": 10.0 - step} for step in (2, 3, 4)})
    assert [point.step for point in read(tmp_path).Scalars("loss")] == [1, 2, 3, 4]


def test_tensorboard_when_the_configuration_holds_a_secret_then_the_event_file_does_not(tmp_path: Path) -> None:
    log_steps(tmp_path, {1: {"loss": 1.0}})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    assert b"seed" in content
    assert b"hunter2" not in content


def test_tensorboard_when_no_step_was_logged_then_closing_leaves_no_file(tmp_path: Path) -> None:
    log_steps(tmp_path, {})
    assert not (tmp_path / "tensorboard").exists()
