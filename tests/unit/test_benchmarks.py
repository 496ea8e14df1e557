"""The benchmarks on tiny models: all sides must compute the same thing, or their times mean nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

import arithmetic
import cases
import checkpoint
import comparing
import measuring
import report
import roofline
import scaling
import sides
import stored_states
import whole_run
from cases import Case, Setup
from measuring import Job, Measurement
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import DataError
from pocl_cli.models.head import split_model
from pocl_cli.records import TokenisedRow
from pocl_cli.registry import kd_methods
from pocl_cli.steps.dispatch import run_step
from pocl_cli.training.objective import collate

PROJECT = Path(__file__).parents[2]
SMALL = Setup(
    layers=2,
    architecture={**cases.TINY, "vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
    lengths=((5, 3), (2, 9), (7, 1)),
    max_tokens_per_micro_batch=16,  # so few that ours makes several micro-batches
    compiled=False,
)
MEASURED = Measurement(
    2.0, 1.0, 1.0, loss=3.0, gradient_norm=5.0, num_rows=1, num_tokens=9, num_response_tokens=4, num_threads=1
)


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "benchmarks" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def loss_and_norm(side: str, method: str, kd_ratio: float, store: Path | None = None) -> tuple[float, float]:
    return measuring.optimizer_step(Case(SMALL, method=method, kd_ratio=kd_ratio, store=store), side)()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    stored_states.fill(SMALL, path)
    return path


# ── sides ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", cases.METHODS)
def test_our_sides_on_the_same_rows_then_loss_and_gradient_norm_are_the_references(method: str, store: Path) -> None:
    expected = loss_and_norm("reference", method, 0.8)

    assert loss_and_norm("online", method, 0.8) == pytest.approx(expected, rel=1e-5)
    assert loss_and_norm("stored", method, 0.8, store) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", sides.PACKAGES)
@pytest.mark.parametrize("method", sides.BETAS)
def test_other_libraries_at_kd_ratio_1_then_they_compute_the_same_quantity(side: str, method: str) -> None:
    if sides.missing_package(side):
        pytest.skip(f"{sides.PACKAGES[side]} is not installed")

    assert loss_and_norm(side, method, 1.0) == pytest.approx(loss_and_norm("reference", method, 1.0), rel=1e-5)


@pytest.mark.parametrize("name", cases.METHODS)
def test_plain_divergence_of_every_method_then_it_equals_the_registered_one(name: str) -> None:
    method = kd_methods.build(yaml.safe_load((PROJECT / "conf" / "kd_method" / f"{name}.yaml").read_text()))
    torch.manual_seed(0)
    log_p, log_q = (2 * torch.randn(2, 3, 7, dtype=torch.float64)).log_softmax(-1), torch.randn(2, 3, 7).log_softmax(-1)

    plain = sides.plain_divergence(method, log_p, log_q.double())

    assert plain.shape == (2, 3)
    torch.testing.assert_close(plain.flatten(), method(log_q.double().flatten(0, 1), log_p.flatten(0, 1)))


# ── comparing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_optimizer_step_on_the_small_model_then_sides_agree_and_the_table_has_them() -> None:
    ended = run_script("optimizer_step.py", "--methods", "fkl", "--repeats", "1", "--sides", "online", "stored")

    assert ended.returncode == 0, ended.stderr
    about, online, stored = (json.loads(line) for line in ended.stdout.splitlines())
    assert about["about"]["threads"] == 1
    assert (online["side"], stored["side"]) == ("online", "stored")
    assert stored["differs_by"] < 1e-4
    assert min(one[name] for one in (online, stored) for name in ("seconds", "cpu_seconds", "peak_gb")) > 0
    table = [line.split() for line in ended.stderr.splitlines() if line.startswith("fkl ")]
    assert [line[1] for line in table] == ["online", "stored"]


def test_line_of_a_side_then_ratios_are_the_references_figures_over_its_own() -> None:
    reference = comparing.line_of("fkl", "reference", MEASURED, [])
    faster = dataclasses.replace(MEASURED, seconds=0.5, peak_gb=0.25, loss=3.3)

    line = comparing.line_of("fkl", "online", faster, [reference])

    assert (reference.time_ratio, reference.differs_by) == (None, None)
    assert (line.time_ratio, line.gb_ratio) == (4.0, 4.0)
    assert line.differs_by == pytest.approx(0.1)
    assert comparing.exit_code([reference, line]) == 1


def test_difference_when_only_the_gradient_norms_differ_then_it_is_theirs() -> None:
    other = dataclasses.replace(MEASURED, gradient_norm=5.5)

    assert comparing.difference(MEASURED, other) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_difference_when_a_number_is_nan_then_it_is_nan(name: str) -> None:
    changes: dict[str, Any] = {name: math.nan}

    assert math.isnan(comparing.difference(MEASURED, dataclasses.replace(MEASURED, **changes)))


def test_sides_when_rows_come_without_a_model_then_it_stops_with_a_usage_error() -> None:
    ended = run_script("optimizer_step.py", "--rows", "rows.jsonl")

    assert ended.returncode == 2
    assert "--rows needs --model" in ended.stderr


def test_available_sides_when_a_package_is_missing_then_its_side_is_left_out_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sides.PACKAGES, "trl", "a_package_that_nobody_has")
    parser = argparse.ArgumentParser()

    assert comparing.available_sides(None, ["reference", "trl"], parser) == ["reference"]
    assert "side trl is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        comparing.available_sides(["trl"], ["reference", "trl"], parser)
    assert stopped.value.code == 2
    assert "--sides trl needs the package" in capsys.readouterr().err


# ── scaling ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scaling_when_the_reference_does_not_fit_then_its_row_says_so() -> None:
    arguments = ["--axes", "rows", "--points", "2", "--sides", "reference", "--memory-gb", "0.001"]
    ended = run_script("scaling.py", *arguments)

    assert ended.returncode == 0, ended.stderr
    about, *rows = (json.loads(line) for line in ended.stdout.splitlines())
    assert about["table"] == "scaling_rows"
    assert [(row["rows"], row["seconds"], row["left_out"][:11]) for row in rows] == [
        (1, None, "needs about"),
        (2, None, "needs about"),
    ]


def test_points_of_every_axis_then_the_setup_varies_in_that_alone() -> None:
    vocabulary, lengths, rows = ([*scaling.points(Setup(), axis, 2)][1].setup for axis in scaling.AXES)

    assert (vocabulary.architecture["vocab_size"], len(vocabulary.lengths)) == (16_384, 8)
    assert lengths.lengths == ((64, 64),) * 8
    assert rows.lengths == cases.DOLLY_LENGTHS[:2]
    assert [*scaling.points(Setup(model=Path("x")), "vocabulary")] == []


# ── roofline ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_forward_of_one_row_then_products_are_those_that_torch_counts() -> None:
    case = Case(SMALL)
    headed = split_model(case.student.model)
    row = TokenisedRow("one", [1, 2, 3], [4, 5])
    with FlopCounterMode(display=False) as counter:
        headed.head(headed.hidden_states(collate([row])))
    counted = counter.get_flop_counts()["Global"]

    needed = arithmetic.forward(headed, [row], num_real_tokens=512)

    assert 2 * (needed.linear + needed.head) == counted[torch.ops.aten.mm]
    # 4 heads of 4, 2 layers, scores and values, and 5 tokens that see 1, 2, 3, 4 and 5 tokens.
    assert needed.attention == 16 * 2 * 2 * 15
    assert needed.head == 2 * 16 * 512


def test_count_of_a_step_then_the_stored_teacher_costs_its_head_alone() -> None:
    case = Case(SMALL)
    student, teacher = (
        arithmetic.forward(split_model(model), case.rows, 512)
        for model in (case.student.model, case.load_teacher().model)
    )

    assert roofline.count(Job(SMALL, "stored")) == 3 * student.total + 13 * 16 * 512
    assert roofline.count(Job(SMALL, "online")) == 3 * student.total + teacher.total


def test_profile_of_a_step_then_every_group_has_its_time(store: Path) -> None:
    shares = roofline.profile(Job(SMALL, "stored", store=store))

    assert min(shares[name] for name in ("matrix products", "softmax", "elementwise", "optimizer", "copies")) > 0


def test_matrix_rates_of_a_setup_then_the_shapes_are_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "RATE_SECONDS", 0.0)

    rates = roofline.matrix_rates(SMALL)

    assert [name.rpartition(", ")[2] for name in rates] == [
        "27 × 16 × 64", "13 × 16 × 512", "13 × 512 × 16", "512 × 13 × 16",
    ]  # fmt: skip
    assert min(rates.values()) > 0


def test_beside_the_roofline_when_a_step_is_faster_than_it_can_be_then_it_warns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert roofline.beside_the_roofline("stored", 10.0, 2.0, 8.0)["times_the_roofline"] == pytest.approx(1.6)
    assert capsys.readouterr().err == ""

    assert roofline.beside_the_roofline("stored", 10.0, 1.0, 8.0)["times_the_roofline"] == pytest.approx(0.8)
    assert "measure again" in capsys.readouterr().err


# ── whole run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whole_run_on_both_sides_then_they_start_with_the_same_loss_and_make_as_many_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    cases.make_model_and_rows(model, rows, num_rows=4)
    cut = ["dataset.max_tokens=32", "dataset.max_prompt_tokens=24"]
    options = whole_run.options_of(["--num-rows", "4", "--epochs", "1", "--batch-size", "2", *cut])
    overrides = whole_run.overrides_of(options, model, rows, tmp_path / "outputs")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        run_step(compose_run("partition", overrides))
        made = run_step(compose_run("distill", overrides))
    assert made is not None

    ours = whole_run.figures_of(made.artifact.path, 1.0, resource.getrusage(resource.RUSAGE_SELF))
    reference = whole_run.run_reference(overrides, None)

    assert (ours.steps, reference.steps, reference.measured_steps) == (6, 6, 6)
    assert ours.first_loss == pytest.approx(reference.first_loss, rel=1e-5)


def test_evenly_spaced_steps_then_the_first_and_the_last_are_among_them() -> None:
    assert whole_run.evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert whole_run.evenly_spaced(range(3), 4) == [0, 1, 2]


# ── report ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def lines_of(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_report_when_it_is_given_one_table_then_only_its_section_changes(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    other = "<!-- bench:b -->\nkept\n<!-- /bench -->\n"
    document.write_text(f"# R\n\n<!-- bench:a -->\nold\n<!-- /bench -->\ntext\n{other}", encoding="utf-8")
    found = lines_of(tmp_path / "lines.jsonl", {"table": "a", "side": "x", "seconds": 1.23456, "rows": 1234})

    assert report.main([str(found), "--document", str(document)]) == 0

    section = "\n| side | s wall | rows |\n| --- | --- | --- |\n| x | 1.235 | 1,234 |\n\n"
    assert document.read_text() == f"# R\n\n<!-- bench:a -->\n{section}<!-- /bench -->\ntext\n{other}"


def test_report_when_the_document_has_no_section_then_it_is_added_and_found_again(tmp_path: Path) -> None:
    tables = report.read_tables([lines_of(tmp_path / "lines.jsonl", {"table": "a", "side": None})])

    once = report.rewritten("# R\n", tables)

    assert once.startswith("# R\n\n<!-- bench:a -->\n")
    assert report.rewritten(once, tables) == once


def test_read_tables_when_a_table_was_measured_twice_then_the_last_counts(tmp_path: Path) -> None:
    about: dict[str, Any] = {"table": "a", "about": {"title": "T"}}
    path = lines_of(tmp_path / "lines.jsonl", about, {"table": "a", "x": 1}, about, {"table": "a", "x": 2})

    assert report.read_tables([path])["a"].rows == [{"x": 2}]


@pytest.mark.parametrize("line", ["{", "[]", '{"x": 1}'])
def test_read_tables_when_a_line_is_no_row_of_a_table_then_it_names_the_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"table": "a"}}\n{line}\n', encoding="utf-8")

    with pytest.raises(DataError, match=r"lines\.jsonl:2"):
        report.read_tables([path])


def test_partition_benchmark_at_two_sizes_then_has_a_line_and_a_table_row_of_each() -> None:
    ended = run_script("partition.py", "--rows", "50", "300", "--difficulty", "cross_entropy")

    assert ended.returncode == 0, ended.stderr
    _, small, large = (json.loads(line) for line in ended.stdout.splitlines())
    assert (small["rows"], large["rows"], large["table"]) == (50, 300, "partition-cross_entropy")
    assert large["scores_gb"] > small["scores_gb"]
    assert min(one[name] for one in (small, large) for name in ("seconds", "cpu_seconds", "peak_gb", "scores_gb")) > 0
    assert [line.split()[0] for line in ended.stderr.splitlines()[-2:]] == ["50", "300"]


def test_partition_benchmark_when_there_are_fewer_rows_than_subsets_then_it_stops_with_a_usage_error() -> None:
    ended = run_script("partition.py", "--rows", "3")

    assert ended.returncode == 2
    assert "--rows must be at least 4" in ended.stderr


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_checkpoint_when_written_and_read_then_it_holds_the_weights_and_two_moments_of_each(tmp_path: Path) -> None:
    wrote, read, num_bytes = checkpoint.write_and_read(Job(SMALL, "stored", repeats=1), tmp_path)
    assert wrote > 0 < read
    num_parameters = sum(one.numel() for one in Case(SMALL).student.model.parameters())
    assert num_bytes == pytest.approx(3 * 4 * num_parameters, rel=0.2)
