"""Rows that are dropped or cut are told of, with their reasons, in training and in evaluation."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pocl_cli.steps import evaluate
from pocl_cli.steps.rows import training_rows

from ..support.recipe import compose, recipe, write_inputs
from ..support.training import toy_tokenizer


def write_with_losses(folder: Path) -> None:
    """The recipe's rows, then one without an answer and one whose prompt is too long."""
    write_inputs(folder)
    extra = [{"instruction": "Copy.", "output": ""}, {"instruction": "red cat " * 60, "output": "red"}]
    with (folder / "rows.jsonl").open("a") as rows:
        rows.writelines(json.dumps(row) + "\n" for row in extra)


@pytest.mark.parametrize("dev_size", [6, 30])
def test_training_rows_when_some_are_dropped_then_each_is_counted_wherever_the_split_puts_it(
    tmp_path: Path, dev_size: int
) -> None:
    write_with_losses(tmp_path / "inputs")
    changes = (f"dataset.dev_size={dev_size}", "dataset.long_prompts=drop", "curriculum=none")
    config = compose(recipe(tmp_path / "inputs", tmp_path / "outputs", *changes)).config
    rows = training_rows(config, toy_tokenizer())
    assert rows.dev is not None
    assert sorted(row.reason for row in rows.dropped) == ["empty response", "prompt longer than 48 tokens"]
    assert len(rows.train) + len(rows.dev) == 30


def test_evaluation_when_rows_are_dropped_or_cut_then_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_with_losses(tmp_path / "inputs")
    test_set = f"{{name: rows, path: {tmp_path}/inputs/rows.jsonl, max_tokens: 60, max_prompt_tokens: 48}}"
    changes = ("evaluation.model=teacher", f"evaluation.datasets=[{test_set}]", "evaluation.decoding.max_new_tokens=4")
    overrides = recipe(tmp_path / "inputs", tmp_path / "outputs", *changes)
    with caplog.at_level(logging.INFO):
        evaluate.run(compose(overrides, "evaluate"))
    assert "rows: 31 rows; 1 dropped (1 × empty response), 1 prompts and 0 responses cut" in caplog.messages
