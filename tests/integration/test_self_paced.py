"""`pocl distill curriculum=self_paced`: what its artifact says, and that a killed run ends in the same bytes."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pocl_cli.run import Run
from pocl_cli.steps import plan, score
from pocl_cli.steps.chain import Chain

from ..support.command import run_pocl
from ..support.processes import die_at_operation, forked
from ..support.recipe import changed, compose, distilled, promised_hashes, recipe
from ..support.training import read_consumed

# 12 of 24 rows, then all; the learning rate lets the first stage turn the order round.
WORDS = ("curriculum=self_paced", "curriculum.stages=3", "curriculum.initial=0.25", "student.dropout=0.1")


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return compose(recipe(place / "inputs", place / "outputs", *WORDS))


def test_student_when_self_paced_then_its_artifact_says_what_each_stage_was_given(run: Run) -> None:
    artifact = distilled(run)

    table = json.loads((artifact.path / "stages.json").read_text())
    assert [(row["num_rows"], row["steps"]) for row in table] == [(6, 4), (15, 10), (24, 16)]
    assert artifact.manifest.audit == [
        {"stage": stage, "steps": row["steps"], "subsets": [0], "num_rows": row["num_rows"], "times": [2, 2]}
        for stage, row in enumerate(table)
    ]
    measured = pq.read_table(artifact.path / "measured.parquet").to_pylist()
    consumed = read_consumed(artifact.path)
    for row in table:
        of_stage = sorted(
            (one for one in measured if one["stage"] == row["stage"]), key=lambda one: (one["cross_entropy"], one["id"])
        )
        assert [one["chosen"] for one in of_stage] == [True] * row["num_rows"] + [False] * (24 - row["num_rows"])
        assert row["max_cross_entropy"] == of_stage[row["num_rows"] - 1]["cross_entropy"]
        chosen = {one["id"] for one in of_stage if one["chosen"]}
        assert {one["id"] for one in consumed if one["stage"] == row["stage"]} == chosen
    # The student before the first step is the one that `pocl score` measures.
    scored = score.run(run.for_step("score")).artifact
    scores = {row["id"]: row["cross_entropy"] for row in pq.read_table(scored.path / "scores.parquet").to_pylist()}
    for one in measured:
        if one["stage"] == 0:
            assert one["cross_entropy"] == pytest.approx(scores[one["id"]], rel=1e-4)


def test_run_when_killed_anywhere_then_ends_in_the_same_bytes(run: Run, place: Path) -> None:
    expected = distilled(run)
    outputs = place / "killed"

    def killed(n: int) -> None:
        die_at_operation(n)
        distilled(changed(run, outputs=outputs))

    died = [forked(lambda: killed(n)) for n in (30, 45, 60, 60, 75)]  # noqa: B023 - called at once
    assert died == [signal.SIGKILL] * 5

    artifact = distilled(changed(run, outputs=outputs))
    assert promised_hashes(artifact.path) == promised_hashes(expected.path)
    assert (artifact.path / "measured.parquet").read_bytes() == (expected.path / "measured.parquet").read_bytes()
    assert artifact.manifest.audit == expected.manifest.audit


def test_plan_when_self_paced_then_has_the_steps_of_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.config.model_copy(update={"plan": run.config.plan.model_copy(update={"enabled": True})})
    plan.show(Chain(changed(run, **{"plan": config.plan})))
    rows = [line.split() for line in capsys.readouterr().err.splitlines() if line[:6].strip().isdigit()]
    assert [(int(row[1]), int(row[3])) for row in rows] == [(6, 4), (15, 10), (24, 16)]


@pytest.mark.skipif(sys.platform != "linux", reason="a worker notices the end of its parent")
def test_run_when_two_processes_train_then_they_choose_as_one_does(place: Path) -> None:
    found = []
    for outputs, hardware in (("one", "cpu"), ("two", "cpu_2")):
        words = recipe(place / "inputs", place / outputs, *WORDS, "student.dropout=0", f"hardware={hardware}")
        finished = run_pocl("distill", *words, "train.evaluate_every=0", "hardware.num_threads=1", cwd=place)
        assert finished.exit_code == 0, finished.stderr
        found.append(place / finished.stdout.strip())
    audits = [json.loads((artifact / "manifest.json").read_bytes())["audit"] for artifact in found]
    assert audits[0] == audits[1]
    alone, together = (pq.read_table(artifact / "measured.parquet") for artifact in found)
    assert together["chosen"] == alone["chosen"]
    assert together["cross_entropy"].slice(0, 24) == alone["cross_entropy"].slice(0, 24)
    assert together["cross_entropy"].to_pylist() == pytest.approx(alone["cross_entropy"].to_pylist(), rel=1e-4)
