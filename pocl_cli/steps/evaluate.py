"""`pocl evaluate`: generate answers on test sets with several seeds and score them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.config import Run
from pocl_cli.data.rows import read_rows
from pocl_cli.data.sources import load_dataset
from pocl_cli.errors import DataError
from pocl_cli.evaluation.metrics import Metric, ScoredAnswer, dataset_metrics, score_answers
from pocl_cli.log import progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, check_context, load_model, read_config
from pocl_cli.models.source import ModelSource, resolve_teacher
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.records import Record, TokenisedRow
from pocl_cli.schema import DatasetConfig, TeacherConfig
from pocl_cli.steps.answers import Answer, answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.result import StepResult, obtain
from pocl_cli.steps.rows import tokenised_rows
from pocl_cli.training.measure import measure_cross_entropy

if TYPE_CHECKING:
    from pocl_cli.artifacts.work import Work

# Rows that are answered and committed together; see score.SHARD_ROWS.
SHARD_ROWS = 256


def run(run: Run) -> StepResult:
    """Scores the answers of a model, or answers made elsewhere (`evaluation.predictions`)."""
    chain = Chain(run)
    if run.config.evaluation.predictions is not None:
        return _evaluate_predictions(chain, Path(run.config.evaluation.predictions).expanduser())
    source, label, inputs = _evaluated(chain)
    key = chain.evaluation_key(source.identity, label)
    found = chain.store.find(key)
    if found is not None:
        return _done(StepResult(found, made=False), found.path)
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return _done(StepResult(work.finished, made=False), work.finished.path)
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
        artifact = _commit(chain, work, metrics, predictions, inputs, exclude=["shards"])
    return _done(StepResult(artifact, made=True), artifact.path)


# ── answers of a model ────────────────────────────────────────────────────────────────────────────────────────────


def _evaluated(chain: Chain) -> tuple[ModelSource, str, dict[str, str]]:
    """The model that is evaluated, its short name, and the artifact that it comes from."""
    which = chain.config.evaluation.model
    if which == "teacher":
        assert chain.teacher is not None, "configuration refuses the teacher of teacher=none"
        source, label = chain.teacher, chain.config.teacher.name
    elif which in (None, "student"):
        artifact = obtain(chain.run, "distill", chain.student_key, chain.store)
        source, label = resolve_teacher(_at(str(artifact.path)), chain.store), chain.student_key.slug
    else:
        source = resolve_teacher(_at(which), chain.store)
        label = source.label
    student = source.identity.get("student")
    return source, label, {"student": str(student)} if student else {}


def _at(path: str) -> TeacherConfig:
    return TeacherConfig(name="evaluated", path=path, experiment=None, overrides=(), revision=None, dtype="auto")


def _evaluate_dataset(
    chain: Chain, dataset: DatasetConfig, loaded: LoadedModel, hardware: Hardware, work: Work
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    evaluation = chain.config.evaluation
    records = load_dataset(dataset).records
    tokenised = tokenised_rows(records, loaded.tokenizer, dataset, chain.config.paths.outputs)
    rows = [tokenised.row(record_id) for record_id in tokenised.ids]
    by_id = {record.id: record for record in records}
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
            lines += _lines(dataset.name, seed, records, [one.text for one in in_order], answers[seed])
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


# ── answers made elsewhere ────────────────────────────────────────────────────────────────────────────────────────


def _evaluate_predictions(chain: Chain, path: Path) -> StepResult:
    dataset = chain.config.evaluation.datasets[0]
    if not path.is_file():
        raise DataError(
            f"no file {path}", where="evaluation.predictions", fix="name a JSON lines file, an answer a row"
        )
    key = chain.evaluation_key({"predictions": sha256_file(path)}, path.name.split(".")[0])
    found = chain.store.find(key)
    if found is not None:
        return _done(StepResult(found, made=False), found.path)
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return _done(StepResult(work.finished, made=False), work.finished.path)
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
        lines = _lines(dataset.name, None, loaded.records, texts, answers)
        artifact = _commit(chain, work, metrics, lines, {}, exclude=[])
    return _done(StepResult(artifact, made=True), artifact.path)


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


# ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lines(
    name: str, seed: int | None, records: Sequence[Record], texts: Sequence[str], answers: Sequence[ScoredAnswer]
) -> list[dict[str, Any]]:
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


def _commit(
    chain: Chain,
    work: Work,
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, str],
    exclude: Sequence[str],
) -> Any:
    durable.write_json(work.path / "metrics.json", {"datasets": metrics})
    durable.write_jsonl(work.path / "predictions.jsonl", predictions)
    return work.commit(
        config=chain.run.resolved, inputs=dict(inputs), command=chain.run.command, seed=None, exclude=exclude
    )


def _done(result: StepResult, path: Path) -> StepResult:
    """Shows the figures of an evaluation, made now or before."""
    datasets = json.loads((path / "metrics.json").read_text())["datasets"]
    names = list(dict.fromkeys(name for metrics in datasets.values() for name in metrics))
    cells = [[name, *(_cell(metrics.get(one)) for one in names)] for name, metrics in datasets.items()]
    tables.results_table("Evaluation", ["data set", *(name.replace("_", " ") for name in names)], cells)
    figures = {f"{dataset}/{name}": metrics[name]["mean"] for dataset, metrics in datasets.items() for name in metrics}
    shown = {key: value for key, value in figures.items() if key.endswith(("/rouge_l", "/exact_match"))}
    return StepResult(result.artifact, made=result.made, figures=shown)


def _cell(metric: Mapping[str, Any] | None) -> str | None:
    if metric is None:
        return None
    spread = f" ± {metric['std']:.2f}" if metric["std"] is not None else ""
    return f"{metric['mean']:.4f}{spread}"
