"""What `pocl score` measures for the difficulties, and what changing the difficulty costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pocl_cli.artifacts import durable
from pocl_cli.errors import ArtifactError
from pocl_cli.models.load import load_model, load_tokenizer
from pocl_cli.records import ATTENTION
from pocl_cli.registry import difficulty_measurers
from pocl_cli.run import Run
from pocl_cli.steps import partition, score
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.rows import training_rows

from ..support.recipe import changed, compose, recipe

# Any of the shipped ones, and fusions of them.
DIFFICULTIES: list[dict[str, Any]] = [
    {"name": "rouge_l"},
    {"name": "cross_entropy"},
    {"name": "ifd"},
    {"name": "teacher_gap"},
    {"name": "length", "part": "prompt"},
    {"name": "rrf", "k": 60},
    {"name": "rrf", "k": 5, "members": ["ifd", {"name": "length", "part": "response", "weight": 0.5}]},
    {"name": "mean_rank", "members": ["rouge_l", "teacher_gap", {"name": "random", "seed": 3}]},
]
# Those that read what a pass of its own measures, when one of them is first asked for.
BY_ATTENTION: list[dict[str, Any]] = [
    {"name": "attention"},
    {"name": "rrf", "k": 60, "members": ["attention", "rouge_l"]},
    {"name": "mean_rank", "members": [{"name": "attention", "weight": 2}, "teacher_gap"]},
]


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    words = recipe(place / "inputs", place / "outputs", "difficulty=rrf", "score.max_new_tokens=4")
    return compose(words, "partition")


def with_difficulty(run: Run, values: dict[str, Any]) -> Run:
    return changed(run, difficulty=difficulty_measurers.build(values))


@contextmanager
def counted_passes() -> Iterator[list[str]]:
    """The embeddings that forward passes of language models begin with."""
    passes: list[str] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            passes.append(type(module).__name__)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield passes
    finally:
        handle.remove()


def test_scores_when_measured_then_hold_the_cross_entropy_of_the_response_alone(run: Run) -> None:
    chain = Chain(run)
    scored = score.run(run.for_step("score")).artifact

    loaded = load_model(chain.student, device=torch.device("cpu"), dtype_override=None, dropout=None)
    tokenizer = load_tokenizer(chain.student)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = training_rows(run.config, tokenizer).train
    table = pq.read_table(scored.path / "scores.parquet").to_pylist()
    for found in table:
        response = torch.tensor(list(rows.row(found["id"]).response_ids))
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[first, *response.tolist()]])).logits[0, :-1]
        expected = nn.functional.cross_entropy(logits.double()[:, : len(tokenizer)], response)
        assert found["cross_entropy_alone"] == pytest.approx(float(expected), rel=1e-5)
        assert found["cross_entropy_alone"] != pytest.approx(found["cross_entropy"], rel=1e-3)
    theirs = chain.store.find(chain.score_key("teacher"))
    assert theirs is not None
    assert pq.read_table(theirs.path / "scores.parquet")["cross_entropy_alone"].null_count == len(table)


def test_partition_when_the_difficulty_changes_then_nothing_is_measured_again(run: Run) -> None:
    score.run(run.for_step("score"))

    with counted_passes() as passes:
        made = [partition.run(with_difficulty(run, values)).artifact for values in DIFFICULTIES]

    assert passes == []
    assert len({artifact.id for artifact in made}) == len(DIFFICULTIES)
    assert len({artifact.manifest.inputs["scores"] for artifact in made}) == 1
    assert ["teacher_scores" in artifact.manifest.inputs for artifact in made] == [
        "teacher_gap" in str(values) for values in DIFFICULTIES
    ]


def test_partition_when_it_first_reads_the_attention_then_that_alone_is_measured(run: Run, place: Path) -> None:
    students = score.run(run.for_step("score")).artifact

    with counted_passes() as passes:
        first = partition.run(with_difficulty(run, BY_ATTENTION[0])).artifact
    made = [first, *(partition.run(with_difficulty(run, values)).artifact for values in BY_ATTENTION[1:])]

    # A pass to compare the output head with the model's, one to try its attention in either layout, one a batch.
    assert 0 < len(passes) <= 12
    attention = Chain(with_difficulty(run, BY_ATTENTION[0])).score_key("attention").id
    assert {artifact.manifest.inputs["attention_scores"] for artifact in made} == {attention}
    assert {artifact.manifest.inputs["scores"] for artifact in made} == {students.id}
    assert Chain(with_difficulty(run, BY_ATTENTION[2])).score_key("student").id == students.id
    measured = Chain(run).store.find(Chain(run).score_key("attention"))
    assert measured is not None
    variances = {row["id"]: row[ATTENTION] for row in pq.read_table(measured.path / "scores.parquet").to_pylist()}
    order = pq.read_table(first.path / "partition.parquet")["id"].to_pylist()
    assert [variances[record_id] for record_id in order] == sorted(variances.values(), reverse=True)
    assert len(set(variances.values())) > 20


def test_partition_when_the_teachers_scores_are_missing_then_they_alone_are_made(run: Run, place: Path) -> None:
    alone = changed(run, outputs=place / "later", score=run.config.score.model_copy(update={"teacher": False}))
    students = score.run(alone.for_step("score")).artifact
    assert Chain(alone).store.find(Chain(alone).score_key("teacher")) is None

    gap = with_difficulty(changed(run, outputs=place / "later"), {"name": "teacher_gap"})
    parted = partition.run(gap).artifact

    theirs = Chain(gap).store.find(Chain(gap).score_key("teacher"))
    assert theirs is not None
    assert parted.manifest.inputs == {"scores": students.id, "teacher_scores": theirs.id}
    ce = [
        {row["id"]: row["cross_entropy"] for row in pq.read_table(one.path / "scores.parquet").to_pylist()}
        for one in (students, theirs)
    ]
    order = pq.read_table(parted.path / "partition.parquet")["id"].to_pylist()
    gaps = [ce[0][record_id] - ce[1][record_id] for record_id in order]
    assert gaps == sorted(gaps)
    assert gaps[0] < gaps[-1]


def test_partition_when_the_teacher_measured_other_rows_then_refuses(run: Run, place: Path) -> None:
    gap = with_difficulty(changed(run, outputs=place / "other"), {"name": "teacher_gap"})
    chain = Chain(gap)
    measured = score.run(run.for_step("score")).artifact
    table = pq.read_table(measured.path / "scores.parquet")
    for who, rows in (("student", table), ("teacher", table.slice(1))):
        with chain.store.open_work(chain.score_key(who)) as work:
            durable.write_parquet(work.path / "scores.parquet", rows)
            work.commit(config=gap.resolved, inputs={}, command=gap.command, seed=None)

    with pytest.raises(ArtifactError, match="teacher's scores are of other rows than the student's"):
        partition.run(gap)
