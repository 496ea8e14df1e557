"""The benchmark of generation on its small model: both sides must give the same, or their times mean nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generation.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generation_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_script()


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def measurement(**changes: float) -> Any:
    numbers: dict[str, float] = {"seconds": 2.0, "cpu_seconds": 1.0, "mean_length": 50.0, "length_deviation": 10.0}
    counts: dict[str, int] = {"num_rows": 4, "num_answers": 100, "num_tokens": 5000, "num_threads": 1}
    given = {**numbers, **counts, "cross_entropy": 3.0, **changes}
    return BENCHMARK.Measurement(task="score", formulation="ours", **given)


def test_benchmark_on_the_small_model_then_both_sides_agree_and_the_table_has_both() -> None:
    ended = run_script("--num-rows", "6", "--max-new-tokens", "8", "--repeats", "1", "--tasks", "score")

    assert ended.returncode == 0, ended.stderr
    _, reference, ours = (json.loads(line) for line in ended.stdout.splitlines())
    assert (reference["formulation"], ours["formulation"]) == ("reference", "ours")
    assert ours["cross_entropy"] == pytest.approx(reference["cross_entropy"], rel=1e-5)
    assert min(one[name] for one in (reference, ours) for name in ("seconds", "cpu_seconds", "tokens")) > 0
    table = [line.split() for line in ended.stderr.splitlines() if line.startswith("score ")]
    assert [line[1] for line in table] == ["reference", "ours"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"mean_length": 55.0}, []),
        ({"mean_length": 70.0}, ["answers"]),
        ({"cross_entropy": 3.1}, ["cross entropy"]),
        ({"cross_entropy": math.nan}, ["cross entropy"]),
    ],
)
def test_disagreements_when_a_number_differs_by_more_than_chance_then_it_is_named(
    changes: dict[str, float], named: list[str]
) -> None:
    found = BENCHMARK.disagreements(measurement(), dataclasses.replace(measurement(), **changes))

    assert len(found) == len(named)
    assert all(name in problem for name, problem in zip(named, found, strict=True))


def test_benchmark_when_rows_come_without_a_model_then_it_stops_with_a_usage_error() -> None:
    ended = run_script("--rows", "rows.jsonl")

    assert ended.returncode == 2
    assert "--rows needs --model" in ended.stderr
