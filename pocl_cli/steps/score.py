"""`pocl score`: measure every training row with the student and, where one is composed, the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.manifest import Artifact
from pocl_cli.artifacts.store import Store
from pocl_cli.config import Run
from pocl_cli.errors import NonFiniteError
from pocl_cli.evaluation.rouge import rouge_l
from pocl_cli.log import get_logger, progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import HeadedModel, split_model
from pocl_cli.models.load import LoadedModel, check_context, load_model, load_tokenizer, read_config
from pocl_cli.models.vocabulary import compare_tokenizers, num_real_tokens
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.schema import DecodingConfig, PoclConfig
from pocl_cli.steps.answers import measure_and_answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.result import StepResult
from pocl_cli.steps.rows import TrainingRows, training_rows
from pocl_cli.training.measure import measure_cross_entropy

# Rows that are measured and committed together. Batches are formed inside a shard, and shards depend on the rows
# alone, so an interrupted step that resumes measures the same batches.
SHARD_ROWS = 128
SCORES = pa.schema(
    [
        ("id", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),
        ("cross_entropy", pa.float64()),
        ("generation", pa.string()),
        ("rouge_l", pa.float64()),
    ]
)


def run(run: Run) -> StepResult:
    """Measures both models, one artifact each; the result is the student's."""
    chain = Chain(run)
    results = [_measure(chain, who) for who in chain.measured]
    return results[-1]


def read_scores(store: Store, artifact: Artifact) -> list[ScoredRecord]:
    """The rows of a scores artifact, after its files have been hashed again."""
    store.verify(artifact)
    return [ScoredRecord(**row) for row in pq.read_table(artifact.path / "scores.parquet").to_pylist()]


def _measure(chain: Chain, who: str) -> StepResult:
    key = chain.score_key(who)
    found = chain.store.find(key)
    if found is not None:
        get_logger().info("the %s has been measured: %s", who, found.path)
        return StepResult(found, made=False, figures=dict(found.manifest.extra))
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return StepResult(work.finished, made=False, figures=dict(work.finished.manifest.extra))
        hardware = set_up_hardware(chain.config.hardware)
        rows, loaded = _load(chain, who, hardware)
        with memory_errors_explained(hardware, f"measuring the {who}"):
            scored = _measure_in_shards(chain.config, who, rows, loaded, hardware, work.path / "shards")
        durable.write_parquet(work.path / "scores.parquet", _table(scored))
        durable.write_jsonl(
            work.path / "dropped.jsonl",
            [{"location": row.location, "reason": row.reason, "id": row.id} for row in rows.dropped],
        )
        figures = _figures(scored)
        artifact = work.commit(
            config=chain.run.resolved,
            inputs={},
            command=chain.run.command,
            seed=chain.config.score.seed if who == "student" else None,
            extra=figures,
            exclude=["shards"],
        )
    get_logger().info("the %s on %d rows: %s", who, len(scored), ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return StepResult(artifact, made=True, figures=figures)


def _load(chain: Chain, who: str, hardware: Hardware) -> tuple[TrainingRows, LoadedModel]:
    source = chain.student if who == "student" else chain.teacher
    assert source is not None, "a chain without a teacher has no teacher to measure"
    tokenizer = load_tokenizer(chain.student)
    if who == "teacher":
        compare_tokenizers(load_tokenizer(source), tokenizer)
    new_tokens = chain.config.score.max_new_tokens if who == "student" else 0
    needed = max(chain.config.dataset.max_tokens, chain.config.dataset.max_prompt_tokens + new_tokens)
    check_context(read_config(source), needed)
    rows = training_rows(chain.config, tokenizer)
    chain.verify_students(source)
    return rows, load_model(source, device=hardware.device, dtype_override=None, dropout=None)


def _measure_in_shards(
    config: PoclConfig, who: str, rows: TrainingRows, loaded: LoadedModel, hardware: Hardware, folder: Path
) -> list[ScoredRecord]:
    """Measures shard after shard, each written when it is whole; those of an interrupted run are read back."""
    decoding = DecodingConfig(
        sampling_temperature=config.score.sampling_temperature,
        top_p=1.0,
        top_k=0,
        no_repeat_ngram_size=config.score.no_repeat_ngram_size,
        max_new_tokens=config.score.max_new_tokens,
    )
    headed = split_model(loaded.model)
    durable.make_folder(folder)
    scored: list[ScoredRecord] = []
    with progress(f"{config.dataset.name}: measuring the {who}", len(rows.train)) as advance:
        for number, shard in enumerate(_shards(rows)):
            path = folder / f"{number:06d}.parquet"
            if path.exists():
                scored += [ScoredRecord(**row) for row in pq.read_table(path).to_pylist()]
                advance(len(shard))
                continue
            if who == "student":
                measured = _measured_by_student(config, loaded, headed, shard, rows, decoding, hardware)
            else:
                measured = measure_cross_entropy(
                    headed,
                    shard,
                    num_real_tokens=num_real_tokens(loaded.tokenizer),
                    pad_token_id=loaded.pad_token_id,
                    hardware=hardware,
                )
            _refuse_non_finite(measured, who)
            durable.write_parquet(path, _table(measured))
            scored += measured
            advance(len(shard))
    by_id = {row.id: row for row in scored}
    return [by_id[record_id] for record_id in rows.train.ids]


def _measured_by_student(
    config: PoclConfig,
    loaded: LoadedModel,
    headed: HeadedModel,
    shard: Sequence[TokenisedRow],
    rows: TrainingRows,
    decoding: DecodingConfig,
    hardware: Hardware,
) -> list[ScoredRecord]:
    """Cross entropy and an answer of each row, with the answer's ROUGE-L."""
    measured, (answers,) = measure_and_answer(
        headed, loaded, shard, decoding=decoding, seeds=[config.score.seed], purpose="score", hardware=hardware
    )
    return [
        replace(row, generation=one.text, rouge_l=rouge_l(one.text, rows.records[row.id].references))
        for row, one in zip(measured, answers, strict=True)
    ]


def _shards(rows: TrainingRows) -> Iterator[list[TokenisedRow]]:
    """All training rows by length, in shards."""
    every = sorted(
        (rows.train.row(record_id) for record_id in rows.train.ids), key=lambda row: (row.num_tokens, row.id)
    )
    for start in range(0, len(every), SHARD_ROWS):
        yield every[start : start + SHARD_ROWS]


def _refuse_non_finite(measured: Sequence[ScoredRecord], who: str) -> None:
    bad = [row.id for row in measured if not math.isfinite(row.cross_entropy)]
    if bad:
        raise NonFiniteError(
            f"the {who}'s cross entropy is not finite",
            where=f"records {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}",
            fix=f"check the {who}'s weights, or use {who}.dtype=float32 hardware.precision=float32",
        )


def _table(scored: Sequence[ScoredRecord]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in scored] for name in SCORES.names}
    return pa.table(columns, schema=SCORES)


def _figures(scored: Sequence[ScoredRecord]) -> dict[str, Any]:
    """Means over the rows: what a person looks at first."""
    tokens = sum(row.num_response_tokens for row in scored)
    figures = {"cross_entropy": math.fsum(r.cross_entropy * r.num_response_tokens for r in scored) / tokens}
    rouge = [row.rouge_l for row in scored if row.rouge_l is not None]
    if rouge:
        figures["rouge_l"] = 100 * math.fsum(rouge) / len(rouge)
    return figures
