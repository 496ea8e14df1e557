"""What decides an artifact's id, and that the four commands find each other's work by the same overrides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hydra import initialize_config_dir

from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import ArtifactError
from pocl_cli.steps import distill, evaluate, partition, score
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.dispatch import run_step

from ..support.folders import memory_folder
from ..support.recipe import recipe, write_inputs


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as place:
        write_inputs(place / "inputs")
        yield place


def chain(folder: Path, *changes: str, outputs: str = "outputs") -> Chain:
    return Chain(compose_run("distill", recipe(folder / "inputs", folder / outputs, *changes)))


def ids(one: Chain) -> dict[str, str]:
    return {
        "scores": one.score_key("student").id,
        "teacher": one.score_key("teacher").id,
        "partition": one.partition_key.id,
        "student": one.student_key.id,
    }


@pytest.fixture(scope="module")
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def base_ids(folder: Path, _hydra: None) -> dict[str, str]:
    return ids(chain(folder))


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ("hardware.num_threads=2", set()),
        ("hardware.max_tokens_per_micro_batch=77", set()),
        ("tracker=tensorboard", set()),
        ("train.log_every=3", set()),
        ("train.checkpoint_every=3", set()),
        ("upstream=require", set()),
        ("evaluation.seeds=[1]", set()),
        ("train.lr=0.01", {"student"}),
        ("train.seed=11", {"student"}),
        ("kd_method=rkl", {"student"}),
        ("kd_method.t_squared=false", {"student"}),
        ("curriculum.temperature.end=3", {"student"}),
        ("curriculum.stages=3", {"partition", "student"}),
        ("difficulty.seed=4", {"partition", "student"}),
        ("score.max_new_tokens=5", {"scores"}),
        ("partition.by=quantiles", {"partition", "student"}),
        ("dataset.limit=20", {"scores", "teacher", "partition", "student"}),
        ("hardware.precision=bfloat16", {"scores", "teacher", "student"}),
        ("student.init_seed=1", {"scores", "student"}),
    ],
)
def test_ids_when_one_key_changes_then_only_what_it_decides_is_another(
    folder: Path, base_ids: dict[str, str], change: str, moved: set[str]
) -> None:
    after = ids(chain(folder, change))
    assert {name for name in base_ids if base_ids[name] != after[name]} == moved


def test_ids_when_the_outputs_lie_elsewhere_then_are_the_same(folder: Path, base_ids: dict[str, str]) -> None:
    assert base_ids == ids(chain(folder, outputs="elsewhere"))


@pytest.mark.usefixtures("_hydra")
def test_student_when_its_method_trains_on_answers_then_the_id_depends_on_them_and_no_others_does(
    folder: Path,
) -> None:
    assert "answers" not in chain(folder).student_key.identity
    answered = chain(folder, "kd_method=seqkd")
    assert answered.student_key.identity["answers"] == {"teacher": answered.answers_key("teacher").id}


@pytest.mark.usefixtures("_hydra")
def test_steps_when_run_in_their_order_then_each_finds_the_one_before(folder: Path) -> None:
    rows_here = f"{{name: rows, path: {folder}/inputs/rows.jsonl, max_tokens: 60, max_prompt_tokens: 48}}"
    changes = ("difficulty=rrf", "upstream=require", "score.max_new_tokens=4", "evaluation.decoding.max_new_tokens=4")
    evaluated_on = ("evaluation.seeds=[1,2]", f"evaluation.datasets=[{rows_here}]")
    overrides = recipe(folder / "inputs", folder / "chain", *changes, *evaluated_on)
    with pytest.raises(ArtifactError, match="pocl score "):
        partition.run(compose_run("partition", overrides))
    scored = score.run(compose_run("score", overrides))
    parted = partition.run(compose_run("partition", overrides))
    trained = distill.run(compose_run("distill", overrides))
    assert trained is not None
    evaluated = evaluate.run(compose_run("evaluate", overrides))

    rows = pq.read_table(scored.artifact.path / "scores.parquet").to_pylist()
    assert len(rows) == 24
    assert all(row["cross_entropy"] > 0 and 0 <= row["rouge_l"] <= 1 and row["generation"] is not None for row in rows)
    told = [json.loads(line) for line in (folder / "inputs" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["instruction"] for row in rows} <= {row["instruction"] for row in told}
    [first, *_] = json.loads((parted.artifact.path / "summary.json").read_text(encoding="utf-8"))["subsets"]
    assert set(first["sample_instructions"]) <= {row["instruction"] for row in rows}
    ranks = pq.read_table(parted.artifact.path / "partition.parquet").to_pylist()
    assert sorted(row["difficulty_rank"] for row in ranks) == list(range(1, 25))
    assert [row["subset"] for row in sorted(ranks, key=lambda row: row["difficulty_rank"])] == [0] * 12 + [1] * 12
    assert parted.artifact.manifest.inputs == {"scores": scored.artifact.id}
    assert trained.artifact.manifest.inputs["partition"] == parted.artifact.id
    assert evaluated.artifact.manifest.inputs == {"student": trained.artifact.id}
    metrics = json.loads((evaluated.artifact.path / "metrics.json").read_text())["datasets"]["rows"]
    assert set(metrics["rouge_l"]["per_seed"]) == {"1", "2"}
    assert set(metrics) >= {"rouge_l", "exact_match", "response_tokens", "ended_with_eos", "cross_entropy"}
    lines = (evaluated.artifact.path / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 30
    for step, made in ((score, scored), (partition, parted), (distill, trained), (evaluate, evaluated)):
        again = run_step(compose_run(step.__name__.rpartition(".")[2], overrides))
        assert again is not None
        assert (again.artifact.id, again.made) == (made.artifact.id, False)


@pytest.mark.usefixtures("_hydra")
def test_student_when_named_by_path_or_id_then_is_the_same_source(folder: Path) -> None:
    made = distill.run(
        compose_run("distill", recipe(folder / "inputs", folder / "named", "curriculum=none", "train.max_steps=2"))
    )
    assert made is not None
    changes = ("student.architecture=null", "student.tokenizer=null")
    by_path = chain(folder, f"student.path={made.artifact.path}", *changes, outputs="named")
    by_id = chain(folder, f"student.path={made.artifact.id}", *changes, outputs="named")
    assert by_path.student.identity == by_id.student.identity == {"student": made.artifact.id, "dtype": "float32"}


@pytest.mark.usefixtures("_hydra")
def test_partition_when_its_file_was_changed_then_is_refused(folder: Path) -> None:
    overrides = recipe(folder / "inputs", folder / "damaged")
    parted = partition.run(compose_run("partition", overrides))
    path = parted.artifact.path / "partition.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"partition\.parquet"):
        distill.run(compose_run("distill", overrides))
