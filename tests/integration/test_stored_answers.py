"""Methods that train on answers: an artifact of their own, made once, and what a student is then trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hydra import initialize_config_dir

from pocl_cli.artifacts.manifest import Artifact
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import ArtifactError
from pocl_cli.models.head import split_model
from pocl_cli.models.load import load_model, load_tokenizer
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.records import TokenisedRow
from pocl_cli.run import Run
from pocl_cli.steps import distill, score
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.dispatch import run_step
from pocl_cli.steps.rows import training_rows
from pocl_cli.training.measure import measure_cross_entropy

from ..support.recipe import changed, distilled, recipe
from ..support.training import HARDWARE

SEQKD = ("kd_method=seqkd", "kd_method.decoding.max_new_tokens=60", "train.max_steps=3", "train.evaluate_every=0")
FLAT = ("curriculum=none", "student.dropout=0")


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose_run("distill", recipe(place / "inputs", place / "outputs", *SEQKD, *FLAT))


@pytest.fixture(scope="module")
def trained(run: Run) -> Artifact:
    return distilled(run)


def answers(run: Run) -> Artifact:
    chain = Chain(run)
    found = chain.store.find(chain.answers_key("teacher"))
    assert found is not None
    return found


def told(artifact: Artifact) -> list[dict[str, Any]]:
    return pq.read_table(artifact.path / "answers.parquet").to_pylist()


def test_distill_when_a_flat_curriculum_needs_answers_then_makes_them_and_scores_nothing(
    run: Run, trained: Artifact
) -> None:
    made = answers(run)
    assert {path.name for path in Chain(run).store.outputs.iterdir() if path.name[0] != "."} >= {"answers", "students"}
    assert not (Chain(run).store.outputs / "scores").exists()
    assert trained.manifest.inputs["teacher_answers"] == made.id
    rows = told(made)
    assert len(rows) == 24
    prompts = training_rows(run.config, load_tokenizer(Chain(run).student)).train
    lengths = [len(prompts.row(row["id"]).prompt_ids) + len(row["token_ids"]) + row["ended"] for row in rows]
    assert max(lengths) == run.config.dataset.max_tokens
    assert {row["ended"] for row in rows} == {True, False}, "the recipe has answers of both kinds"
    tokenizer = load_tokenizer(Chain(run).student)
    assert [row["text"] for row in rows] == [
        tokenizer.decode(row["token_ids"], skip_special_tokens=True) for row in rows
    ]
    assert made.manifest.extra["num_rows"] == 24
    assert made.manifest.extra["empty"] == sum(not row["token_ids"] for row in rows)


def test_seqkd_when_it_trains_then_its_loss_is_the_cross_entropy_of_the_teachers_answers(
    run: Run, trained: Artifact
) -> None:
    chain = Chain(run)
    gold = training_rows(run.config, load_tokenizer(chain.student)).train
    eos = load_tokenizer(chain.student).eos_token_id
    drawn = pq.read_table(trained.path / "consumed.parquet").to_pylist()
    first = [row["id"] for row in drawn if row["step"] == 1]
    replaced = [
        TokenisedRow(row["id"], gold.row(row["id"]).prompt_ids, row["token_ids"] + [eos] * row["ended"])
        for row in told(answers(run))
        if row["id"] in first
    ]
    loaded = load_model(chain.student, device=torch.device("cpu"), dtype_override=torch.float32, dropout=0.0)
    measured = measure_cross_entropy(
        split_model(loaded.model), replaced, num_real_tokens=num_real_tokens(loaded.tokenizer), hardware=HARDWARE
    )
    num_tokens = sum(row.num_response_tokens for row in measured)
    line = json.loads((trained.path / "metrics.jsonl").read_text().splitlines()[0])
    assert len(replaced) == 3
    assert line["num_tokens"] == num_tokens
    assert line["loss"] == pytest.approx(
        sum(row.cross_entropy * row.num_response_tokens for row in measured) / num_tokens, rel=1e-5
    )
    assert (line["kd"], line["ce"]) == (0, pytest.approx(line["loss"]))


@pytest.mark.usefixtures("trained")
def test_answers_when_the_teacher_or_the_decoding_differs_then_they_and_the_student_are_others(run: Run) -> None:
    method = run.config.kd_method
    others = [
        changed(run, kd_method=type(method)(decoding=type(method.decoding)(**{**vars(method.decoding), **change})))
        for change in ({"seed": 11}, {"sampling_temperature": 0.0}, {"max_new_tokens": 6})
    ]
    others.append(changed(run, dataset=run.config.dataset.model_copy(update={"limit": 20})))
    found = [(Chain(one).answers_key("teacher").id, Chain(one).student_key.id) for one in [run, *others]]
    assert len({one for one, _ in found}) == len({one for _, one in found}) == 5
    same = changed(run, train=run.config.train.model_copy(update={"seed": 3}))
    assert Chain(same).answers_key("teacher").id == found[0][0]


def test_distill_when_answers_are_missing_and_nothing_may_be_made_then_names_the_command(
    run: Run, tmp_path: Path
) -> None:
    alone = changed(run, outputs=tmp_path, upstream="require")
    with pytest.raises(ArtifactError, match="no answers artifact") as caught:
        distill.run(alone)
    assert "pocl score " in str(caught.value)


def test_score_when_the_method_trains_on_answers_then_makes_them_too_and_its_result_is_the_students_scores(
    run: Run, tmp_path: Path
) -> None:
    scoring = changed(run.for_step("score"), outputs=tmp_path)
    result = score.run(scoring)
    assert (result.made, result.artifact.kind) == (True, "scores")
    made = answers(scoring)
    again = run_step(scoring)
    assert again is not None
    assert (again.made, again.artifact.id, answers(scoring).manifest) == (False, result.artifact.id, made.manifest)
    required = changed(run, outputs=tmp_path, upstream="require")
    assert distilled(required).manifest.inputs["teacher_answers"] == made.id


def test_training_when_the_answers_are_of_other_rows_or_damaged_then_is_refused(run: Run, tmp_path: Path) -> None:
    scoring = changed(run, outputs=tmp_path)
    distilled(scoring)
    (file,) = tmp_path.glob("answers/*-*/answers.parquet")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    again = changed(scoring, train=run.config.train.model_copy(update={"seed": 5}))
    with pytest.raises(ArtifactError, match=r"answers\.parquet"):
        distill.run(again)


def test_distillm2_when_the_teacher_is_stored_then_only_answers_are_and_the_numbers_are_those_of_the_online_one(
    place: Path, tmp_path: Path
) -> None:
    words = (
        "kd_method=distillm2",
        "kd_method.decoding.max_new_tokens=6",
        "train.evaluate_every=0",
        "student.dropout=0",
    )
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        run = compose_run("distill", recipe(place / "inputs", tmp_path / "out", *words))
    losses = []
    for number, store in enumerate((True, False)):
        teacher = run.config.teacher.model_copy(update={"store": store})
        made = distilled(changed(run, outputs=tmp_path / str(number), teacher=teacher))
        losses.append([json.loads(line)["loss"] for line in (made.path / "metrics.jsonl").read_text().splitlines()])
        assert set(made.manifest.inputs) == {"partition", "teacher_answers", "student_answers"}
        (audited, _) = made.manifest.audit or []
        assert audited["num_rows"] == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    (shard,) = (tmp_path / "0" / "teacher_signals").glob("*-shard-*")
    ids = pq.read_table(shard / "rows.parquet")["id"].to_pylist()
    assert sorted({row_id.partition("@")[2] for row_id in ids}) == ["student", "teacher"]
    assert len(ids) == 48


def test_plan_when_the_method_trains_on_answers_then_says_whether_they_are_there_and_what_they_take(
    run: Run, trained: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = run.config.plan.model_copy(update={"enabled": True})
    assert distill.run(changed(run, plan=planned)) is None
    assert "stored: teacher-on-local-" in capsys.readouterr().err
    assert distill.run(changed(run, plan=planned, outputs=tmp_path)) is None
    shown = capsys.readouterr().err
    assert "made first (pocl score, or upstream=auto)" in shown
    assert "answers of the teacher (estimate)" in shown
    assert list(tmp_path.iterdir()) == []
