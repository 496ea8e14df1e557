"""`pocl evaluate`: generate answers on test sets with several seeds and score them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli.artifacts import durable
from pocl_cli.run import Run
from pocl_cli.data.sources import load_dataset
from pocl_cli.evaluation.metrics import Metric, ScoredAnswer, dataset_metrics, score_answers
from pocl_cli.log import progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, check_context, load_model, read_config
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.records import TokenisedRow
from pocl_cli.schema import DatasetConfig
from pocl_cli.steps.answers import Answer, answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.predictions import commit_evaluation, evaluate_predictions, prediction_lines, report
from pocl_cli.steps.result import StepResult
from pocl_cli.steps.rows import tell_losses, tokenised_rows
from pocl_cli.training.measure import measure_cross_entropy

if TYPE_CHECKING:
    from pocl_cli.artifacts.work import Work

# Rows that are answered and committed together; see training.shards.
SHARD_ROWS = 256


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
        decoding = run.config.evaluation.decoding
        for one in run.config.evaluation.datasets:
            check_context(read_config(source), max(one.max_tokens, one.max_prompt_tokens + decoding.max_new_tokens))
        chain.verify_students(source)
        loaded = load_model(source, device=hardware.device, dtype_override=None, dropout=None)
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
    by_id = {record.id: record for record in source.records}
    records = tuple(by_id[row.id] for row in rows)
    measured = measure_cross_entropy(
        split_model(loaded.model),
        rows,
        num_real_tokens=num_real_tokens(loaded.tokenizer),
        pad_token_id=loaded.pad_token_id,
        hardware=hardware,
    )
    answers: dict[int | None, Sequence[ScoredAnswer]] = {}
    lines: list[dict[str, Any]] = []
    with progress(f"{dataset.name}: answering", len(rows) * len(evaluation.seeds)) as advance:
        for seed in evaluation.seeds:
            folder = work.path / "shards" / f"{dataset.name}-{seed}"
            texts: list[Answer] = []
            for number, shard in enumerate(_shards(rows)):
                texts += _answered(folder / f"{number:06d}.json", shard, loaded, evaluation.decoding, seed, hardware)
                advance(len(shard))
            by_row = dict(zip((row.id for shard in _shards(rows) for row in shard), texts, strict=True))
            in_order = [by_row[row.id] for row in rows]
            answers[seed] = score_answers(
                records,
                [one.text for one in in_order],
                num_tokens=[one.num_tokens for one in in_order],
                ended_with_eos=[one.ended for one in in_order],
            )
            lines += prediction_lines(dataset.name, seed, records, [one.text for one in in_order], answers[seed])
    return dataset_metrics(records, answers, measured_references=measured), lines


def _shards(rows: Sequence[TokenisedRow]) -> list[list[TokenisedRow]]:
    every = sorted(rows, key=lambda row: (len(row.prompt_ids), row.id))
    return [every[start : start + SHARD_ROWS] for start in range(0, len(every), SHARD_ROWS)]


def _answered(
    path: Path, shard: Sequence[TokenisedRow], loaded: LoadedModel, decoding: Any, seed: int, hardware: Hardware
) -> list[Answer]:
    """The answers of one shard, read back where an interrupted run made them."""
    if path.exists():
        return [Answer(**values) for values in json.loads(path.read_text())]
    answers = answer(loaded, shard, decoding=decoding, seed=seed, purpose="evaluate", hardware=hardware)
    durable.write_json(path, [{"text": one.text, "num_tokens": one.num_tokens, "ended": one.ended} for one in answers])
    return answers
