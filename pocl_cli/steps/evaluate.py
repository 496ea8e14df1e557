"""`pocl evaluate`: generate answers on test sets with several seeds and score them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli.artifacts import durable
from pocl_cli.config import Run
from pocl_cli.data.sources import load_dataset
from pocl_cli.evaluation.metrics import Metric, ScoredAnswer, dataset_metrics, score_answers
from pocl_cli.log import progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, load_model
from pocl_cli.paths import confined
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.schema import DatasetConfig
from pocl_cli.steps import checks
from pocl_cli.steps.answers import Answer, measure_and_answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.predictions import commit_evaluation, evaluate_predictions, prediction_lines, report
from pocl_cli.steps.result import StepResult
from pocl_cli.steps.rows import tell_losses, tokenised_rows
from pocl_cli.steps.weights import loadable

if TYPE_CHECKING:
    from pocl_cli.artifacts.work import Work

# Rows that are answered and committed together; see training.shards.
SHARD_ROWS = 128


def run(run: Run) -> StepResult:
    """Scores the answers of a model, or answers made elsewhere (`evaluation.predictions`)."""
    if run.config.evaluation.predictions is not None:
        return evaluate_predictions(run)
    chain = Chain(run)
    source, _ = chain.evaluated
    with chain.store.open_work(chain.evaluation_key) as work:
        if work.finished is not None:
            return report(StepResult(work.finished, made=False))
        hardware = set_up_hardware(run.config.hardware)
        checks.refuse_early(checks.of_evaluation(chain, source))
        loaded = load_model(loadable(chain, source), device=hardware.device, dtype_override=None, dropout=None)
        metrics, predictions = {}, []
        for one in run.config.evaluation.datasets:
            with memory_errors_explained(hardware, f"evaluating {one.name}"):
                metrics[one.name], lines = _evaluate_dataset(chain, one, loaded, hardware, work)
            predictions += lines
        inputs = {"student": str(source.identity["student"])} if "student" in source.identity else {}
        artifact = commit_evaluation(run, work, metrics, predictions, inputs, exclude=["shards"])
    return report(StepResult(artifact, made=True))


def _evaluate_dataset(
    chain: Chain, dataset: DatasetConfig, loaded: LoadedModel, hardware: Hardware, work: Work
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    evaluation = chain.config.evaluation
    source = load_dataset(dataset)
    tokenised = tokenised_rows(source.records, loaded.tokenizer, dataset, chain.config.paths.outputs)
    tell_losses(dataset.name, tokenised, (*source.dropped, *tokenised.dropped))
    rows = [tokenised.row(record_id) for record_id in tokenised.ids]
    all_records = {record.id: record for record in source.records}
    records = tuple(all_records[row.id] for row in rows)
    shards = _measured_in_shards(
        chain, dataset.name, rows, loaded, hardware, confined(work.path / "shards", dataset.name)
    )
    measured = {row.id: row for shard in shards for row in shard.measured}
    answers: dict[int | None, Sequence[ScoredAnswer]] = {}
    lines: list[dict[str, Any]] = []
    for place, seed in enumerate(evaluation.seeds):
        by_id = {row.id: one for shard in shards for row, one in zip(shard.measured, shard.answers[place], strict=True)}
        in_order = [by_id[row.id] for row in rows]
        answers[seed] = score_answers(
            records,
            [one.text for one in in_order],
            num_tokens=[one.num_tokens for one in in_order],
            ended_with_eos=[one.ended for one in in_order],
        )
        lines += prediction_lines(dataset.name, seed, records, [one.text for one in in_order], answers[seed])
    return dataset_metrics(records, answers, measured_references=[measured[row.id] for row in rows]), lines


@dataclass(frozen=True, slots=True)
class _Shard:
    """What was measured of some rows: their references' cross entropy, and the answers, a list a seed."""

    measured: Sequence[ScoredRecord]
    answers: Sequence[Sequence[Answer]]


def _measured_in_shards(
    chain: Chain, name: str, rows: Sequence[TokenisedRow], loaded: LoadedModel, hardware: Hardware, folder: Path
) -> list[_Shard]:
    """Measures shard after shard, each written when it is whole; those of an interrupted run are read back."""
    evaluation = chain.config.evaluation
    headed = split_model(loaded.model)
    found = []
    with progress(f"{name}: answering", len(rows) * len(evaluation.seeds)) as advance:
        for number, shard in enumerate(_shards(rows)):
            path = folder / f"{number:06d}.json"
            if path.exists():
                found.append(_read(path))
                advance(len(shard) * len(evaluation.seeds))
                continue
            measured, answers = measure_and_answer(
                headed,
                loaded,
                shard,
                decoding=evaluation.decoding,
                seeds=evaluation.seeds,
                purpose="evaluate",
                hardware=hardware,
                advance=advance,
            )
            found.append(_Shard(measured, answers))
            durable.write_json(path, asdict(found[-1]))
    return found


def _read(path: Path) -> _Shard:
    values = json.loads(path.read_text(encoding="utf-8"))
    return _Shard(
        [ScoredRecord(**row) for row in values["measured"]],
        [[Answer(**one) for one in of_seed] for of_seed in values["answers"]],
    )


def _shards(rows: Sequence[TokenisedRow]) -> list[list[TokenisedRow]]:
    every = sorted(rows, key=lambda row: (len(row.prompt_ids), row.id))
    return [every[start : start + SHARD_ROWS] for start in range(0, len(every), SHARD_ROWS)]
