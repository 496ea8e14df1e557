"""A comparison of two arms with two training seeds: it goes on where it was stopped, and its numbers are the runs'."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pocl_cli.comparison import statistics

from ..support.command import Finished, run_pocl
from ..support.folders import memory_folder
from ..support.recipe import recipe, write_inputs

COMPARISON = """\
# Two arms that learn the answers in a second.
name: two
arms:
  flat: [curriculum=none, curriculum.stages=1, curriculum.kd_ratio.end=0.0]
  growing: [curriculum=baby_step, curriculum.kd_ratio.start=0.0, curriculum.kd_ratio.end=0.0]
only: null
baseline: flat
steps_of: growing
methods: null
seeds: [1, 2]
num_jobs: 1
confidence: 0.9
num_resamples: 200
resampling_seed: 3
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        write_inputs(path)
        (path / "conf" / "comparison").mkdir(parents=True)
        (path / "conf" / "comparison" / "two.yaml").write_text(COMPARISON, encoding="utf-8")
        yield path


def compare(folder: Path, outputs: str, *words: str, **options: Any) -> Finished:
    tests = f"evaluation.datasets=[{{name: rows, path: {folder}/rows.jsonl, max_tokens: 64, max_prompt_tokens: 48}}]"
    chain = [word for word in recipe(folder, folder / outputs) if not word.startswith(("evaluation.", "upstream="))]
    small = ["train.lr=0.03", "curriculum.epochs_per_stage=3", "evaluation.decoding.max_new_tokens=4"]
    arguments = ["--config-dir", f"{folder}/conf", "comparison=two", *chain, tests, *small, *words]
    return run_pocl("compare", *arguments, cwd=folder, **options)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Finished:
    return compare(folder, "outputs")


def content_of(done: Finished) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    content: dict[str, Any] = json.loads((Path(line) / "comparison.json").read_text())
    return content


def without_times(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "rows": [{**row, "train_seconds": None} for row in content["rows"]]}


def answers(outputs: Path, evaluation: str) -> dict[str, float]:
    """ROUGE-L by row, read from an evaluation without the help of the package."""
    (path,) = (outputs / "evaluations").glob(f"*-{evaluation}/predictions.jsonl")
    return {line["id"]: line["rouge_l"] for line in map(json.loads, path.read_text().splitlines())}


def test_compare_when_it_is_done_then_its_numbers_are_those_of_the_evaluations(
    folder: Path, undisturbed: Finished
) -> None:
    content = content_of(undisturbed)
    runs = content["runs"]["fkl"]
    by_arm = {arm: [answers(folder / "outputs", runs[arm][seed]["evaluations"]) for seed in ("1", "2")] for arm in runs}
    flat, growing = content["rows"]
    for row, arm in ((flat, "flat"), (growing, "growing")):
        means = [sum(of_seed.values()) / 30 for of_seed in by_arm[arm]]
        assert row["figures"]["rouge_l"]["mean"] == pytest.approx(sum(means) / 2)
        assert row["figures"]["rouge_l"]["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    ids = list(by_arm["flat"][0])
    expected = np.array(
        [
            [ours[row] - theirs[row] for row in ids]
            for ours, theirs in zip(by_arm["growing"], by_arm["flat"], strict=True)
        ]
    )
    assert np.abs(expected).max() > 0, "arms that answer alike would prove nothing"
    found = growing["differences"]["rouge_l"]
    assert found["mean"] == pytest.approx(expected.mean())
    assert (found["wins"], found["losses"]) == ((expected > 0).sum(), (expected < 0).sum())
    assert found["p_prompts"] == statistics.p_over_prompts(expected, num_resamples=200, seed=3)
    assert found["p_seeds"] in (0.5, 1.0)


def test_compare_when_it_is_done_then_files_and_tables_agree(folder: Path, undisturbed: Finished) -> None:
    content, path = content_of(undisturbed), Path(undisturbed.stdout.strip())
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["inputs"]["evaluations fkl/growing/2"] == content["runs"]["fkl"]["growing"]["2"]["evaluations"]
    assert len(manifest["inputs"]) == 8
    _, growing = csv.DictReader((path / "table.csv").read_text().splitlines())
    assert float(growing["rouge_l_mean"]) == content["rows"][1]["figures"]["rouge_l"]["mean"]
    assert growing["steps"] == "36"
    shown = f"{content['rows'][1]['figures']['rouge_l']['mean']:.2f} ±"
    assert shown in undisturbed.stderr
    assert shown in (path / "table.md").read_text()
    table = pq.read_table(path / "differences.parquet").to_pylist()
    assert len(table) == 60
    assert all(row["rouge_l_difference"] == row["rouge_l"] - row["rouge_l_baseline"] for row in table)


def test_compare_when_arms_have_one_and_two_stages_then_steps_are_matched_and_the_rest_is_said(
    undisturbed: Finished,
) -> None:
    content = content_of(undisturbed)
    assert [row["steps"] for row in content["rows"]] == [36, 36]
    assert content["mismatches"]["fkl"]["growing"] == [
        "2 learning-rate cosines instead of 1",
        "2 optimizer starts instead of 1",
    ]
    assert "growing does not match flat: 2 learning-rate cosines instead of 1" in undisturbed.stderr


def test_compare_when_called_again_then_everything_is_reused_and_the_tables_are_shown(
    folder: Path, undisturbed: Finished
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "outputs").glob("*/*/manifest.json")}
    again = compare(folder, "outputs")
    assert (again.exit_code, again.stdout) == (0, undisturbed.stdout)
    assert {path: path.stat().st_mtime_ns for path in (folder / "outputs").glob("*/*/manifest.json")} == before
    assert "runs are missing" not in again.stderr
    assert again.stderr.partition("rows, fkl")[2] == undisturbed.stderr.partition("rows, fkl")[2]


def test_compare_when_it_is_stopped_in_the_middle_then_the_same_command_goes_on(
    folder: Path, undisturbed: Finished
) -> None:
    stopped = compare(folder, "stopped", interrupt_at=lambda said: "run 2 of 4" in said, interrupt_by=signal.SIGTERM)
    assert (stopped.exit_code, stopped.stdout) == (143, "")
    students = {
        path: path.stat().st_mtime_ns for path in (folder / "stopped" / "students").glob("*-seed*/manifest.json")
    }
    assert 2 <= len(students) < 4
    goes_on = compare(folder, "stopped")
    assert Path(goes_on.stdout.strip()).name == Path(undisturbed.stdout.strip()).name
    assert without_times(content_of(goes_on)) == without_times(content_of(undisturbed))
    assert all(path.stat().st_mtime_ns == time for path, time in students.items())


def test_compare_when_one_more_seed_is_asked_for_then_only_its_runs_are_made(
    folder: Path, undisturbed: Finished
) -> None:
    more = compare(folder, "outputs", "comparison.seeds=[1,2,3]")
    assert "2 runs are missing" in more.stderr
    assert more.stdout != undisturbed.stdout
    assert list(content_of(more)["rows"][1]["figures"]["rouge_l"]["per_seed"]) == ["1", "2", "3"]


def test_compare_when_an_arm_fails_then_the_others_run_and_every_error_comes_at_the_end(folder: Path) -> None:
    words = ["+comparison.arms.steep=[train.lr=1e30,train.lr_end=0,curriculum.stages=2]", "comparison.seeds=[1,2]"]
    done = compare(folder, "outputs", *words, "comparison.only=[flat,growing,steep]")
    assert (done.exit_code, done.stdout) == (7, "")
    assert [line.partition(" — ")[0].partition(", seed")[0] for line in done.errors] == [
        "pocl: error: fkl, steep",
        "pocl: error: fkl, steep",
    ]
    assert "comparison of" not in done.stderr


def test_compare_when_two_arms_are_equal_then_they_are_refused(folder: Path) -> None:
    words = ["+comparison.arms.twin=[curriculum=baby_step,curriculum.kd_ratio.start=0.0,curriculum.kd_ratio.end=0.0]"]
    done = compare(folder, "outputs", *words)
    assert done.exit_code == 2
    (line,) = done.errors
    assert line.startswith("pocl: error: arms are equal: growing and twin in conf/comparison/two.yaml")


def test_compare_when_an_arm_is_evaluated_otherwise_then_it_is_refused(folder: Path) -> None:
    done = compare(folder, "outputs", "+comparison.arms.short=[evaluation.decoding.max_new_tokens=2,train.lr=0.01]")
    assert done.exit_code == 2
    assert "short would be evaluated otherwise than the baseline flat" in done.errors[0]


def test_plan_when_some_runs_exist_then_all_are_listed_and_nothing_is_made(folder: Path, undisturbed: Finished) -> None:
    before = sorted(folder.rglob("*"))
    done = compare(folder, "outputs", "plan=true", "comparison.seeds=[1,4]")
    assert (done.exit_code, done.stdout) == (0, "")
    rows = [line.split() for line in done.stderr.splitlines() if line.startswith("fkl")]
    assert [row[1:4] for row in rows] == [
        ["flat", "1", "36"],
        ["flat", "4", "36"],
        ["growing", "1", "36"],
        ["growing", "4", "36"],
    ]
    assert ["done" in row for row in rows] == [True, False, True, False]
    assert sorted(folder.rglob("*")) == before


def test_plan_when_nothing_exists_then_the_inputs_are_said_to_be_missing(folder: Path) -> None:
    done = compare(folder, "nothing", "plan=true", "student.experiment=demo_warm_student", "student.architecture=null",
                   "student.tokenizer=null")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "to do, and its inputs" in done.stderr
    assert not (folder / "nothing").exists()


def test_require_when_a_student_is_missing_then_its_command_is_named(folder: Path) -> None:
    done = compare(folder, "outputs", "comparison.seeds=[1,9]", "upstream=require")
    assert done.exit_code == 4
    assert "pocl distill" in done.errors[0]
    assert "train.seed=9" in done.errors[0]


# ── several at a time ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_compare_when_runs_go_side_by_side_then_errors_are_told_and_the_numbers_are_the_same(folder: Path) -> None:
    words = ["comparison.seeds=[1]", "comparison.num_jobs=2"]
    steep = ["+comparison.arms.steep=[train.lr=1e30,train.lr_end=0]", "comparison.only=[flat,growing,steep]"]
    failed = compare(folder, "parallel", *words, *steep)
    assert "3 runs are missing; 2 at a time" in failed.stderr
    assert failed.exit_code == 7
    (line,) = failed.errors
    assert line.startswith("pocl: error: fkl, steep, seed 1: ")
    assert "left no reason" not in line

    done, alone = compare(folder, "parallel", *words), compare(folder, "outputs", *words)
    assert "are missing" not in done.stderr
    assert without_times(content_of(done)) == without_times(content_of(alone))
    assert Path(done.stdout.strip()).name == Path(alone.stdout.strip()).name


@pytest.mark.slow
def test_compare_when_runs_side_by_side_train_on_the_same_answers_then_these_are_made_once_before(folder: Path) -> None:
    words = ["kd_method=seqkd", "kd_method.decoding.max_new_tokens=4", "comparison.num_jobs=2", "comparison.seeds=[1]"]
    done = compare(folder, "answered", *words)
    assert done.exit_code == 0, done.stderr
    before, _, _ = done.stderr.partition("run 1 of 2")
    assert before.count("the teacher answered 24 rows") == 1
    assert len(list((folder / "answered" / "answers").glob("*-*"))) == 1


def processes_below(folder: Path) -> list[int]:
    """The processes whose command line holds the folder, by what the system says of them."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in found if str(folder) in line and int(line.split()[0]) != os.getpid()]


@pytest.mark.slow
def test_compare_when_it_is_stopped_with_runs_side_by_side_then_they_end_too(folder: Path) -> None:
    words = ["comparison.num_jobs=2", "curriculum.epochs_per_stage=100", "train.checkpoint_every=1000"]
    begun: list[float] = []

    def trains(said: str) -> bool:
        """When both have begun to train."""
        if len(list((folder / "both" / ".work").glob("*/stages.json"))) == 2:
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + 1

    done = compare(folder, "both", *words, interrupt_at=trains, interrupt_by=signal.SIGTERM)
    assert done.exit_code == 143, done.stderr
    assert processes_below(folder / "both") == []
    assert len(list((folder / "both" / ".work").glob("*/checkpoints/*/state.json"))) >= 2
