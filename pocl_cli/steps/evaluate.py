"""`pocl evaluate`: generate answers on test sets with several seeds and score them; of plain text, perplexity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli.artifacts import durable
from pocl_cli.data.sources import load_dataset
from pocl_cli.evaluation.metrics import Metric, ScoredAnswer, dataset_metrics, score_answers, text_metrics
from pocl_cli.log import progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, load_model
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.paths import confined
from pocl_cli.processes.job import FOLDER, LOCK
from pocl_cli.records import Record, ScoredRecord, TokenisedRow
from pocl_cli.run import Run
from pocl_cli.schema import EvaluationConfig
from pocl_cli.steps import checks
from pocl_cli.steps.answers import Answer, measure_and_answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.parts import do_part
from pocl_cli.steps.predictions import (
    commit_evaluation,
    evaluate_predictions,
    prediction_lines,
    report,
    write_evaluation,
)
from pocl_cli.steps.result import StepResult
from pocl_cli.steps.rows import records_by_row, tell_losses, tokenised_rows
from pocl_cli.steps.shard_files import SHARDS, ShardFiles
from pocl_cli.steps.weights import loadable
from pocl_cli.training.measure import measure_cross_entropy

if TYPE_CHECKING:
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.training.parallel import Processes

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
        checks.refuse_early(checks.of_evaluation(chain, source))
        do_part("answer", chain, work)
        inputs = {"student": str(source.identity["student"])} if "student" in source.identity else {}
        artifact = commit_evaluation(run, work, inputs, exclude=[SHARDS, FOLDER, LOCK])
    return report(StepResult(artifact, made=True))


# ── inside each process ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _TestSet:
    """The usable rows of a data set, as token ids and as they are, and the files of their shards."""

    name: str
    has_prompts: bool
    rows: Sequence[TokenisedRow]
    records: Sequence[Record]
    shards: Sequence[Sequence[TokenisedRow]]
    files: ShardFiles


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured of a shard: its references' cross entropy, and the answers, a list a seed."""

    rows: Sequence[ScoredRecord]
    answers: Sequence[Sequence[Answer]]


def answer(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """Leaves `metrics.json` and `predictions.jsonl` in `folder`, whoever answered which shard.

    A shard is written when it is whole; those of an interrupted run are not answered again.
    """
    hardware = set_up_hardware(chain.config.hardware, rank=processes.local_rank)
    source, _ = chain.evaluated
    loaded = load_model(loadable(chain, source), device=hardware.device, dtype_override=None, dropout=None)
    sets = _test_sets(chain, loaded, folder / SHARDS)
    headed = split_model(loaded.model)
    for one in sets:
        with memory_errors_explained(hardware, f"evaluating {one.name}"):
            _answer_missing(chain.config.evaluation, one, headed, loaded, hardware, processes)
    if processes.is_first:
        scored = [_score(chain.config.evaluation, one) for one in sets]
        metrics = {one.name: found for one, (found, _) in zip(sets, scored, strict=True)}
        write_evaluation(folder, metrics, [line for _, lines in scored for line in lines])
    return {}


def _test_sets(chain: Chain, loaded: LoadedModel, folder: Path) -> list[_TestSet]:
    found: list[_TestSet] = []
    for dataset in chain.config.evaluation.datasets:
        source = load_dataset(dataset)
        tokenised = tokenised_rows(source.records, loaded.tokenizer, dataset, chain.config.paths.outputs)
        tell_losses(dataset.name, tokenised, (*source.dropped, *tokenised.dropped), dataset)
        rows = [tokenised.row(record_id) for record_id in tokenised.ids]
        by_row = records_by_row(source.records, tokenised.ids)
        files = ShardFiles(confined(folder, dataset.name), "json", first=sum(len(one.shards) for one in found))
        records = [by_row[row.id] for row in rows]
        found.append(_TestSet(dataset.name, dataset.has_prompts, rows, records, _shards(rows), files))
    return found


def _shards(rows: Sequence[TokenisedRow]) -> list[list[TokenisedRow]]:
    every = sorted(rows, key=lambda row: (len(row.prompt_ids), row.id))
    return [every[start : start + SHARD_ROWS] for start in range(0, len(every), SHARD_ROWS)]


def _answer_missing(
    evaluation: EvaluationConfig,
    one: _TestSet,
    headed: HeadedModel,
    loaded: LoadedModel,
    hardware: Hardware,
    processes: Processes,
) -> None:
    missing = one.files.missing(one.shards, processes)
    if not one.has_prompts:
        num_real = num_real_tokens(loaded.tokenizer)
        with progress(f"{one.name}: measuring", sum(len(shard) for _, shard in missing)) as advance:
            for path, shard in missing:
                rows = measure_cross_entropy(
                    headed, shard, num_real_tokens=num_real, hardware=hardware, advance=advance
                )
                durable.write_json(path, asdict(_Measured(rows, [])))
        return
    with progress(f"{one.name}: answering", sum(len(shard) for _, shard in missing) * len(evaluation.seeds)) as advance:
        for path, shard in missing:
            measured = _Measured(
                *measure_and_answer(
                    headed,
                    loaded,
                    shard,
                    decoding=evaluation.decoding,
                    seeds=evaluation.seeds,
                    purpose="evaluate",
                    hardware=hardware,
                    advance=advance,
                )
            )
            durable.write_json(path, asdict(measured))


def _score(evaluation: EvaluationConfig, one: _TestSet) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """The metrics of a data set and the lines of `predictions.jsonl`, once every process has answered its shards."""
    shards = [_read(path) for path in one.files.all(len(one.shards))]
    measured = {row.id: row for shard in shards for row in shard.rows}
    references = [measured[row.id] for row in one.rows]
    if not one.has_prompts:
        return text_metrics(one.records, references), []
    answers: dict[int | None, Sequence[ScoredAnswer]] = {}
    lines: list[dict[str, Any]] = []
    for place, seed in enumerate(evaluation.seeds):
        by_id = {row.id: given for shard in shards for row, given in zip(shard.rows, shard.answers[place], strict=True)}
        in_order = [by_id[row.id] for row in one.rows]
        texts = [given.text for given in in_order]
        answers[seed] = score_answers(
            one.records,
            texts,
            num_tokens=[given.num_tokens for given in in_order],
            ended_with_eos=[given.ended for given in in_order],
        )
        lines += prediction_lines(one.name, seed, one.records, texts, answers[seed])
    return dataset_metrics(one.records, answers, measured_references=references), lines


def _read(path: Path) -> _Measured:
    values = json.loads(path.read_text(encoding="utf-8"))
    return _Measured(
        [ScoredRecord(**row) for row in values["rows"]],
        [[Answer(**one) for one in of_seed] for of_seed in values["answers"]],
    )
