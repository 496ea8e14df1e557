"""One run whose numbers are written down: a refactor must give the same losses and gradient norms.

`tests/golden/tiny_run.json` holds 20 steps of the tiny recipe without dropout, from the rows of the toy data set to the
gradients. Where a change is meant to alter them (another order of rows, another initial state, new toy tasks), write
them anew and look at the difference before it is committed:

    POCL_WRITE_GOLDEN=1 python -m pytest tests/integration/test_golden.py
    git diff tests/golden
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ..support.recipe import compose, distilled, recipe, write_inputs
from ..support.training import dev_lines, train_lines

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_run.json"
RTOL = 1e-4  # processors round differently, and 20 steps of AdamW carry it on
STEPS = 20


def numbers(folder: Path) -> dict[str, list[Any]]:
    """The run's numbers by name, one of each a step or a dev evaluation."""
    names = ("stage", "epoch", "num_tokens", "lr", "loss", "ce", "kd", "grad_norm")
    columns = {name: [line[name] for line in train_lines(folder)] for name in names}
    return {**columns, "dev_cross_entropy": [line["dev_cross_entropy"] for line in dev_lines(folder)]}


def test_tiny_run_when_trained_then_has_the_numbers_that_were_written_down(tmp_path):
    write_inputs(tmp_path / "inputs")
    changes = ("student.dropout=0", f"train.max_steps={STEPS}")

    measured = numbers(distilled(compose(recipe(tmp_path / "inputs", tmp_path / "outputs", *changes))).path)

    if os.environ.get("POCL_WRITE_GOLDEN") == "1":
        columns = ",\n".join(f'"{name}": {json.dumps(values)}' for name, values in measured.items())
        GOLDEN.write_text(f"{{\n{columns}\n}}\n", encoding="utf-8")
        pytest.skip(f"{GOLDEN.name} was written anew")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert measured.keys() == golden.keys()
    assert len(measured["loss"]) == STEPS
    for name, values in golden.items():
        assert measured[name] == pytest.approx(values, rel=RTOL), name
