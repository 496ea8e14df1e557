"""`evaluation.predictions`: answers made elsewhere, without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import DataError
from pocl_cli.steps.dispatch import run_step

SHARED = Path(os.environ.get("POCL_SHARED", Path(__file__).parents[2].parent / "shared"))
ROWS = [
    {"instruction": "Say hello.", "output": "Hello there"},
    {"instruction": "Name a colour.", "output": ["red", "blue"], "category": "words"},
]


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def metrics(predictions: Path, rows: Path, outputs: Path) -> dict[str, dict[str, object]]:
    overrides = [
        f"evaluation.predictions={predictions}", f"evaluation.datasets=[{rows}]", f"paths.outputs={outputs}"
    ]  # fmt: skip
    artifact = run_step(compose_run("evaluate", overrides)).artifact
    return json.loads((artifact.path / "metrics.json").read_text())["datasets"]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_predictions_when_given_then_are_paired_by_row_and_scored_against_the_best_reference(tmp_path: Path) -> None:
    answers = write(tmp_path / "answers.jsonl", [{"prediction": "hello, THERE"}, {"text": "blue"}])
    found = metrics(answers, write(tmp_path / "rows.jsonl", ROWS), tmp_path / "outputs")
    assert found["rows"]["rouge_l"]["mean"] == 100
    assert found["rows"]["exact_match"]["mean"] == 100
    assert found["rows"]["rouge_l"]["per_seed"] == {}
    assert "cross_entropy" not in found["rows"]
    assert "ended_with_eos" not in found["rows"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([{"text": "one"}], "1 predictions for 2 usable rows"),
        ([{"text": "one"}, {"answer": "two"}], "without text"),
    ],
)
def test_predictions_when_they_do_not_fit_then_the_data_is_at_fault(
    tmp_path: Path, answers: list[dict[str, object]], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        metrics(write(tmp_path / "answers.jsonl", answers), write(tmp_path / "rows.jsonl", ROWS), tmp_path / "outputs")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here (POCL_SHARED)")
def test_predictions_when_they_are_the_published_ones_then_the_scores_are_the_published_ones(tmp_path: Path) -> None:
    answers = SHARED / "data" / "oracle" / "dolly_eval_answers_seed10.jsonl"
    found = metrics(answers, SHARED / "data" / "dolly_eval.jsonl", tmp_path / "outputs")
    assert round(found["dolly_eval"]["rouge_l"]["mean"], 4) == 24.2393
    assert round(found["dolly_eval"]["exact_match"]["mean"], 4) == 2.8
