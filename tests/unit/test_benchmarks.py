"""The benchmarks at a small size: what they measure must be right, or their figures mean nothing."""

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
import torch
import yaml

from pocl_cli.registry import kd_methods

PROJECT = Path(__file__).parents[2]
SCRIPTS = PROJECT / "benchmarks"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_script("optimizer_step")


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def measurement(**changes: float) -> Any:
    numbers: dict[str, float] = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_gb": 1.0, "loss": 3.0, "gradient_norm": 5.0}
    counts: dict[str, int] = {"num_rows": 1, "num_tokens": 9, "num_response_tokens": 4, "num_threads": 1}
    return dataclasses.replace(BENCHMARK.Measurement("fkl", "ours", **numbers, **counts), **changes)


def test_benchmark_on_the_small_model_then_both_sides_agree_and_the_table_has_both() -> None:
    # So few tokens that ours makes several micro-batches.
    ended = run_script("optimizer_step", "--methods", "fkl", "--repeats", "1", "--max-tokens-per-micro-batch", "256")

    assert ended.returncode == 0, ended.stderr
    reference, ours = (json.loads(line) for line in ended.stdout.splitlines())
    assert (reference["formulation"], ours["formulation"]) == ("reference", "ours")
    for name in ("loss", "gradient_norm"):
        assert ours[name] == pytest.approx(reference[name], rel=1e-4)
    assert min(one[name] for one in (reference, ours) for name in ("seconds", "cpu_seconds", "peak_gb")) > 0
    table = [line.split() for line in ended.stderr.splitlines() if line.startswith("fkl ")]
    assert [line[1] for line in table] == ["reference", "ours"]
    assert float(table[1][5]) == pytest.approx(reference["seconds"] / ours["seconds"], rel=1e-3)


@pytest.mark.parametrize("name", BENCHMARK.METHODS)
def test_plain_divergence_of_every_method_then_it_equals_the_registered_one(name: str) -> None:
    method = kd_methods.build(yaml.safe_load((PROJECT / "conf" / "kd_method" / f"{name}.yaml").read_text()))
    torch.manual_seed(0)
    log_p, log_q = (2 * torch.randn(2, 3, 7, dtype=torch.float64)).log_softmax(-1), torch.randn(2, 3, 7).log_softmax(-1)

    plain = BENCHMARK.plain_divergence(method, log_p, log_q.double())

    assert plain.shape == (2, 3)
    torch.testing.assert_close(plain.flatten(), method(log_q.double().flatten(0, 1), log_p.flatten(0, 1)))


def test_difference_when_only_the_gradient_norms_differ_then_it_is_theirs() -> None:
    assert BENCHMARK.difference(measurement(), measurement(gradient_norm=5.5)) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_difference_when_a_number_is_nan_then_it_is_nan(name: str) -> None:
    assert math.isnan(BENCHMARK.difference(measurement(), measurement(**{name: math.nan})))


def test_benchmark_when_rows_come_without_a_model_then_it_stops_with_a_usage_error() -> None:
    ended = run_script("optimizer_step", "--rows", "rows.jsonl")

    assert ended.returncode == 2
    assert "--rows needs --model" in ended.stderr


def test_partition_benchmark_at_two_sizes_then_has_a_line_and_a_table_row_of_each() -> None:
    ended = run_script("partition", "--rows", "50", "300", "--difficulty", "cross_entropy")

    assert ended.returncode == 0, ended.stderr
    small, large = (json.loads(line) for line in ended.stdout.splitlines())
    assert (small["num_rows"], large["num_rows"], large["difficulty"]) == (50, 300, "cross_entropy")
    assert large["scores_gb"] > small["scores_gb"]
    assert min(one[name] for one in (small, large) for name in ("seconds", "cpu_seconds", "peak_gb", "scores_gb")) > 0
    assert [line.split()[0] for line in ended.stderr.splitlines()[-2:]] == ["50", "300"]


def test_partition_benchmark_when_there_are_fewer_rows_than_subsets_then_it_stops_with_a_usage_error() -> None:
    ended = run_script("partition", "--rows", "3")

    assert ended.returncode == 2
    assert "--rows must be at least 4" in ended.stderr
