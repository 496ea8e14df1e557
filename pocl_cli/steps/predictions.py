"""Answers made elsewhere (`evaluation.predictions`), and what every evaluation writes and shows. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.data.rows import read_rows
from pocl_cli.data.sources import load_dataset
from pocl_cli.errors import DataError
from pocl_cli.evaluation.metrics import ScoredAnswer, dataset_metrics, score_answers
from pocl_cli.records import Record
from pocl_cli.run import Run
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.result import StepResult

if TYPE_CHECKING:
    from pocl_cli.artifacts.manifest import Artifact
    from pocl_cli.artifacts.work import Work


def evaluate_predictions(run: Run) -> StepResult:
    """Scores the answers of `evaluation.predictions`, one line a row of the one data set.

    Raises DataError where the file is missing, a line has no text, or the numbers of lines and rows differ.
    """
    chain, (dataset,) = Chain(run), run.config.evaluation.datasets
    path = Path(str(run.config.evaluation.predictions)).expanduser()
    with chain.store.open_work(chain.evaluation_key) as work:
        if work.finished is not None:
            return report(StepResult(work.finished, made=False))
        loaded = load_dataset(dataset)
        texts = [_text(row.values, row.location) for row in read_rows(path, str(path))]
        if loaded.dropped or len(texts) != len(loaded.records):
            raise DataError(
                f"{len(texts)} predictions for {len(loaded.records)} usable rows of {dataset.name}",
                where=str(path),
                why=f"predictions are paired by row; {len(loaded.dropped)} rows of the set are not usable",
                fix="give one line per row of the data set, in its order, and evaluation.datasets=[the same file]",
            )
        answers = score_answers(loaded.records, texts)
        metrics = {dataset.name: dataset_metrics(loaded.records, {None: answers})}
        lines = prediction_lines(dataset.name, None, loaded.records, texts, answers)
        write_evaluation(work.path, metrics, lines)
        artifact = commit_evaluation(run, work, {}, exclude=[])
    return report(StepResult(artifact, made=True))


def _text(values: Mapping[str, Any], location: str) -> str:
    for name in ("prediction", "text"):
        if isinstance(values.get(name), str):
            return str(values[name])
    raise DataError(
        "a prediction without text",
        where=location,
        why=f"its keys are {', '.join(values)}",
        fix='give "text" or "prediction"',
    )


def prediction_lines(
    name: str, seed: int | None, records: Sequence[Record], texts: Sequence[str], answers: Sequence[ScoredAnswer]
) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl for the answers of one data set and seed (None: made elsewhere)."""
    return [
        {
            "dataset": name,
            "seed": seed,
            "id": record.id,
            "instruction": record.instruction,
            "input": record.input,
            "references": list(record.references),
            "prediction": text,
            "rouge_l": 100 * scored.rouge_l,
            "exact_match": scored.exact_match,
        }
        for record, text, scored in zip(records, texts, answers, strict=True)
    ]


def write_evaluation(folder: Path, metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> None:
    """Writes metrics.json and predictions.jsonl."""
    durable.write_json(folder / "metrics.json", {"datasets": metrics})
    durable.write_jsonl(folder / "predictions.jsonl", predictions)


def commit_evaluation(run: Run, work: Work, inputs: Mapping[str, str], exclude: Sequence[str]) -> Artifact:
    """Makes the artifact from what `write_evaluation` wrote."""
    return work.commit(config=run.resolved, inputs=dict(inputs), command=run.command, seed=None, exclude=exclude)


def report(result: StepResult) -> StepResult:
    """Shows the figures of an evaluation, made now or before, and puts the main ones into the result."""
    datasets = json.loads((result.artifact.path / "metrics.json").read_text())["datasets"]
    names = list(dict.fromkeys(name for metrics in datasets.values() for name in metrics))
    cells = [[name, *(_cell(metrics.get(one)) for one in names)] for name, metrics in datasets.items()]
    tables.results_table("Evaluation", ["data set", *(name.replace("_", " ") for name in names)], cells)
    figures = {f"{dataset}/{name}": metrics[name]["mean"] for dataset, metrics in datasets.items() for name in metrics}
    shown = {key: value for key, value in figures.items() if key.endswith(("/rouge_l", "/exact_match", "/perplexity"))}
    return StepResult(result.artifact, made=result.made, figures=shown)


def _cell(metric: Mapping[str, Any] | None) -> str | None:
    if metric is None:
        return None
    spread = f" ± {metric['std']:.2f}" if metric["std"] is not None else ""
    return f"{metric['mean']:.4f}{spread}"
