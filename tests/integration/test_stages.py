"""`pocl distill` over two stages: the stage table, who is trained on when, and which state is handed on and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_cli.artifacts import Artifact, Store
from pocl_cli.artifacts.manifest import verify
from pocl_cli.errors import ArtifactError
from pocl_cli.models.head import split_model
from pocl_cli.models.load import load_tokenizer
from pocl_cli.run import Run
from pocl_cli.steps import distill
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.rows import training_rows
from pocl_cli.training.journal import Journal
from pocl_cli.training.measure import measure_cross_entropy

from ..support.processes import die_at_operation, forked
from ..support.recipe import changed, compose, distilled, promised_hashes, recipe
from ..support.subsets import with_exposure
from ..support.training import HARDWARE, dev_lines, read_consumed, read_lines, train_lines

Distil = Callable[..., Artifact]


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return compose(recipe(place / "inputs", place / "outputs"))


@pytest.fixture(scope="module")
def distil(run: Run) -> Distil:
    """Trains, or finds, the student of the recipe with other values in its `train` section."""

    def make(**train: Any) -> Artifact:
        return distilled(changed(run, train=run.config.train.model_copy(update=train)))

    return make


def stages_of(artifact: Artifact) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = json.loads((artifact.path / "stages.json").read_text(encoding="utf-8"))
    return stages


def subsets_of(run: Run) -> dict[str, int]:
    """The subset of every training row."""
    found = Store(Path(run.config.paths.outputs)).find(Chain(run).partition_key)
    assert found is not None
    table = pq.read_table(found.path / "partition.parquet").to_pylist()
    return {row["id"]: row["subset"] for row in table}


# ── what a run leaves ─────────────────────────────────────────────────────────────────────────────────────────────


def test_stage_table_when_written_then_is_what_was_trained(distil):
    artifact = distil()

    assert stages_of(artifact) == [
        {"stage": 0, "num_rows": 12, "epochs": 2, "steps": 8, "temperature": 1.0, "kd_ratio": 0.7, "lr": 4e-3},
        {"stage": 1, "num_rows": 24, "epochs": 2, "steps": 16, "temperature": 2.0, "kd_ratio": 1.0, "lr": 4e-3},
    ]
    for stage in stages_of(artifact):
        lines = [line for line in train_lines(artifact.path) if line["stage"] == stage["stage"]]
        assert len(lines) == stage["steps"]
        assert {(line["temperature"], line["kd_ratio"]) for line in lines} == {
            (stage["temperature"], stage["kd_ratio"])
        }
        assert lines[0]["lr"] == stage["lr"]


def test_consumed_rows_when_a_stage_trains_then_come_from_its_subsets_and_each_once_an_epoch(distil, run):
    consumed = read_consumed(distil().path)

    subset = subsets_of(run)
    for stage, rows in ((0, 12), (1, 24)):
        for epoch in (0, 1):
            ids = [row["id"] for row in consumed if (row["stage"], row["epoch"]) == (stage, epoch)]
            assert sorted(ids) == sorted(record_id for record_id in subset if subset[record_id] <= stage)
            assert len(ids) == rows


def test_manifest_when_a_student_is_finished_then_says_which_subsets_each_stage_used(distil):
    assert distil().manifest.audit == [
        {"stage": 0, "steps": 8, "subsets": [0], "num_rows": 12, "times": [2, 2]},
        {"stage": 1, "steps": 16, "subsets": [0, 1], "num_rows": 24, "times": [2, 2]},
    ]
    assert distil(checkpoint_policy="last", max_steps=11).manifest.audit == [
        {"stage": 0, "steps": 8, "subsets": [0], "num_rows": 12, "times": [2, 2]},
        {"stage": 1, "steps": 3, "subsets": [0, 1], "num_rows": 9, "times": [0, 1]},
    ]


def test_run_when_the_loop_saw_other_rows_than_the_table_says_then_gives_no_student(run, place, monkeypatch):
    changed_run = changed(run, outputs=place / "wrong-rows", train=run.config.train.model_copy(update={"seed": 5}))
    whole = Journal.consumed
    seen: list[str] = []

    def one_row_again(self: Journal, record_ids: list[str], **labels: int) -> None:
        seen.extend(record_ids)
        whole(self, [seen[0], *record_ids[1:]] if len(seen) == 6 else record_ids, **labels)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "consumed", one_row_again)
        with pytest.raises(ArtifactError, match=r"stage 0 saw a row twice in one epoch"):
            distilled(changed_run)
    assert Store(place / "wrong-rows").find(Chain(changed_run).student_key) is None


@pytest.mark.parametrize(("curriculum", "exposure"), with_exposure())
def test_curriculum_when_any_is_run_then_it_passes_its_audit(place, curriculum, exposure):
    words = [f"curriculum={curriculum}", f"curriculum.exposure={exposure}", "train.evaluate_every=0"]

    artifact = distilled(compose([*recipe(place / "inputs", place / "outputs"), *words]))

    assert [stage["steps"] for stage in artifact.manifest.audit or []] == [row["steps"] for row in stages_of(artifact)]


def test_stage_table_when_a_stage_converged_then_is_what_was_trained(place):
    words = ["curriculum.epochs_per_stage=6", "curriculum.convergence.metric=dev_cross_entropy", "train.lr=0.5"]
    words += ["curriculum.convergence.patience=1", "train.lr_end=0.5", "train.seed=3"]

    artifact = distilled(compose([*recipe(place / "inputs", place / "outputs"), *words]))

    table = stages_of(artifact)
    assert [row["steps"] for row in artifact.manifest.audit or []] == [row["steps"] for row in table]
    assert sum(row["epochs"] for row in table) < 12
    for row in table:
        assert row["steps"] == row["epochs"] * {0: 4, 1: 8}[row["stage"]]
        of_stage = [line for line in dev_lines(artifact.path) if line["stage"] == row["stage"] and line["step"]]
        figures = [line["dev_cross_entropy"] for line in of_stage]
        assert len(figures) == row["epochs"]
        assert row["epochs"] == 6 or figures[-1] >= min(figures[:-1])
        assert figures[:-1] == sorted(figures[:-1], reverse=True)


def test_dev_lines_when_written_then_have_their_own_names_and_no_dev_row_is_trained_on(distil, run):
    artifact = distil()

    assert [(line["step"], line["stage"], line["epoch"]) for line in dev_lines(artifact.path)] == [
        (0, 0, 0),
        (4, 0, 1),
        (8, 0, 2),
        (16, 1, 1),
        (24, 1, 2),
    ]
    for line in dev_lines(artifact.path):
        named = {name for name in line if name.startswith("dev_")}
        assert line.keys() - named == {"step", "stage", "epoch"}
        assert {"dev_rouge_l", "dev_cross_entropy"} <= named
    dev = training_rows(run.config, load_tokenizer(Chain(run).student)).dev
    assert dev is not None
    assert {row["id"] for row in read_consumed(artifact.path)}.isdisjoint(dev.ids)
    assert len(dev.ids) == 6


def test_student_when_finished_then_is_whole_an_ordinary_model_and_found_again(distil, run):
    artifact = distil()

    verify(artifact)
    assert {name.split("/")[0] for name in artifact.manifest.files} == {
        *("model", "stages.json", "metrics.jsonl", "timings.jsonl", "consumed.parquet"),
    }
    assert artifact.manifest.inputs == {"partition": Chain(run).partition_key.id}
    model = AutoModelForCausalLM.from_pretrained(artifact.path / "model")
    assert len(AutoTokenizer.from_pretrained(artifact.path / "model")) == model.config.vocab_size
    before = {path: path.stat().st_mtime_ns for path in artifact.path.rglob("*")}
    again = distill.run(run)
    assert again is not None
    assert (again.made, again.artifact.path) == (False, artifact.path)
    assert {path: path.stat().st_mtime_ns for path in artifact.path.rglob("*")} == before


# ── which state is kept ───────────────────────────────────────────────────────────────────────────────────────────


def cross_entropy_of(artifact: Artifact, run: Run) -> float:
    """The dev cross entropy of the model that was kept."""
    loaded = AutoModelForCausalLM.from_pretrained(artifact.path / "model")
    tokenizer = load_tokenizer(Chain(run).student)
    dev = training_rows(run.config, tokenizer).dev
    assert dev is not None
    rows = [dev.row(record_id) for record_id in dev.ids]
    measured = measure_cross_entropy(split_model(loaded), rows, num_real_tokens=len(tokenizer), hardware=HARDWARE)
    tokens = sum(row.num_response_tokens for row in measured)
    return sum(row.cross_entropy * row.num_response_tokens for row in measured) / tokens


def test_student_when_the_policy_is_best_then_is_the_last_stages_best_state(distil, run):
    artifact = distil(checkpoint_policy="best")

    *_, earlier, last = dev_lines(artifact.path)
    assert earlier["dev_rouge_l"] == last["dev_rouge_l"]
    assert earlier["dev_cross_entropy"] < last["dev_cross_entropy"]
    assert cross_entropy_of(artifact, run) == pytest.approx(earlier["dev_cross_entropy"], rel=1e-6)
    assert artifact.manifest.extra == {name: earlier[name] for name in ("dev_rouge_l", "dev_cross_entropy")}


def test_student_when_the_policy_is_last_then_is_the_last_state(distil, run):
    artifact = distil(checkpoint_policy="last")

    last = dev_lines(artifact.path)[-1]
    assert cross_entropy_of(artifact, run) == pytest.approx(last["dev_cross_entropy"], rel=1e-6)
    assert artifact.manifest.extra == {name: last[name] for name in ("dev_rouge_l", "dev_cross_entropy")}


@pytest.mark.parametrize("changes", [{"evaluate_every": 0}, {"evaluate_every": 0, "checkpoint_policy": "last"}])
def test_student_when_dev_is_never_evaluated_then_is_the_last_state_and_has_no_dev_figures(distil, changes):
    artifact = distil(**changes)

    assert dev_lines(artifact.path) == []
    assert artifact.manifest.extra == {}
    # The evaluations draw from streams of their own: without them the same steps are made.
    assert train_lines(artifact.path) == train_lines(distil(checkpoint_policy="last").path)


def test_run_when_stopped_by_max_steps_then_made_the_first_steps_of_the_whole_run(distil):
    whole, cut = distil(checkpoint_policy="last"), distil(checkpoint_policy="last", max_steps=11)

    assert train_lines(cut.path) == train_lines(whole.path)[:11]
    assert [row["steps"] for row in stages_of(cut)] == [8, 3]


def test_run_when_partial_batches_are_dropped_then_makes_whole_ones_only(distil):
    artifact = distil(drop_last=True, global_batch_size=5)

    assert [row["steps"] for row in stages_of(artifact)] == [4, 8]
    steps = [row["step"] for row in read_consumed(artifact.path)]
    assert {steps.count(step) for step in steps} == {5}


def test_dev_figures_when_a_stage_has_fewer_dev_rows_then_are_those_of_the_first_ones_and_training_is_the_same(distil):
    whole = distil(checkpoint_policy="last")
    fewer, one = (distil(checkpoint_policy="last", dev_rows=dev_rows) for dev_rows in ((6, 1), 1))

    of_whole, of_fewer, of_one = (dev_lines(artifact.path) for artifact in (whole, fewer, one))
    assert [line["stage"] for line in of_fewer] == [0, 0, 0, 1, 1]
    assert of_fewer == [*of_whole[:3], *of_one[3:]]
    assert of_one[3]["dev_cross_entropy"] != of_whole[3]["dev_cross_entropy"]
    assert train_lines(fewer.path) == train_lines(whole.path)


# ── what decides the numbers, and what does not ───────────────────────────────────────────────────────────────────


def test_bytes_when_only_intervals_change_then_stay_and_so_does_the_id(distil, run, place):
    artifact = distil()
    train = run.config.train.model_copy(update={"checkpoint_every": 3, "log_every": 7})

    other = distilled(changed(run, outputs=place / "other-intervals", train=train))

    assert other.id == artifact.id
    kept, now = promised_hashes(artifact.path), promised_hashes(other.path)
    assert now.pop("metrics.jsonl") != kept.pop("metrics.jsonl")
    assert now == kept
    assert [line for line in read_lines(artifact.path) if line in read_lines(other.path)] == read_lines(other.path)
    assert [line["step"] for line in train_lines(other.path)] == [1, 7, 8, 14, 21, 24]


def test_bytes_when_gradients_are_checkpointed_then_stay(distil, run, place):
    student = run.config.student.model_copy(update={"gradient_checkpointing": True})

    other = distilled(changed(run, outputs=place / "checkpointed", student=student))

    assert promised_hashes(other.path) == promised_hashes(distil().path)


def test_dropout_when_null_then_is_the_architectures(distil, run):
    losses = {}
    for dropout in (0.0, 0.1):
        student = run.config.student.model_copy(update={"dropout": dropout})
        losses[dropout] = [line["loss"] for line in train_lines(distilled(changed(run, student=student)).path)]

    assert losses[0.1] == [line["loss"] for line in train_lines(distil().path)]
    assert losses[0.0] != losses[0.1]


def test_student_when_fine_tuned_without_teacher_and_curriculum_then_needs_no_partition(place):
    chain = ("teacher.", "curriculum.", "upstream=")
    overrides = [one for one in recipe(place / "inputs", place / "flat") if not one.startswith(chain)]

    artifact = distilled(
        compose([*overrides, "teacher=none", "kd_method=sft", "curriculum=none", "curriculum.epochs_per_stage=1"])
    )

    assert artifact.manifest.inputs == {}
    assert not (place / "flat" / "partitions").exists()
    assert [(row["steps"], row["kd_ratio"]) for row in stages_of(artifact)] == [(8, 1.0)]
    assert all(line["kd"] == 0 and line["loss"] == pytest.approx(line["ce"]) for line in train_lines(artifact.path))


def test_run_when_an_interrupted_one_differs_then_starts_afresh_and_says_in_what(distil, run, caplog):
    train = run.config.train.model_copy(update={"seed": 77})

    def killed() -> None:
        die_at_operation(90)
        distilled(changed(run, train=train.model_copy(update={"lr": 0.5})))

    assert forked(killed)
    with caplog.at_level(logging.INFO):
        artifact = distilled(changed(run, train=train))

    assert [message for message in caplog.messages if "train.lr: 0.5 → 0.004" in message]
    assert train_lines(artifact.path)[0]["step"] == 1
