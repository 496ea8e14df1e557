"""`pocl score`: measure every training row with the student and, where one is composed, the teacher.

A KD method that trains on answers gets them here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_cli.artifacts import durable
from pocl_cli.errors import NonFiniteError
from pocl_cli.evaluation.rouge import rouge_l
from pocl_cli.log import get_logger, progress
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, load_model, load_tokenizer
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.processes.job import FOLDER, LOCK
from pocl_cli.records import ATTENTION, AttentionRecord, ScoredRecord, TokenisedRow, answers_of
from pocl_cli.run import Run
from pocl_cli.schema import DecodingConfig
from pocl_cli.steps import checks
from pocl_cli.steps.answers import measure_and_answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.parts import do_part
from pocl_cli.steps.result import StepResult
from pocl_cli.steps.rows import TrainingRows, training_rows
from pocl_cli.steps.shard_files import SHARDS, ShardFiles
from pocl_cli.steps.stored_answers import make_answers
from pocl_cli.steps.teacher import teacher_of
from pocl_cli.steps.weights import loadable
from pocl_cli.training.measure import measure_cross_entropy
from pocl_cli.training.measure_attention import measure_attention
from pocl_cli.training.measure_teacher import measure_teacher
from pocl_cli.training.parallel import Processes
from pocl_cli.training.shards import in_shards

# Measures the rows of a shard. Batches are formed inside a shard, and shards depend on the rows alone, so an
# interrupted step that resumes measures the same batches.
Measured: TypeAlias = ScoredRecord | AttentionRecord
Measure: TypeAlias = Callable[[list[TokenisedRow]], Sequence[Measured]]
MEASURED = pa.schema(
    [
        ("id", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),
        ("cross_entropy", pa.float64()),
        ("generation", pa.string()),
        ("rouge_l", pa.float64()),
        ("cross_entropy_alone", pa.float64()),
    ]
)
ATTENTION_MEASURED = pa.schema(
    [
        ("id", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_response_tokens", pa.int32()),
        (ATTENTION, pa.float64()),
    ]
)
# Its beginning, for people: whoever ranks the rows need not read the data set to show some of them.
INSTRUCTION = pa.field("instruction", pa.string())


class _Measuring(NamedTuple):
    """One way to measure rows: who measures, what a row becomes, and the columns that it is written in."""

    measurer: Callable[[Chain, TrainingRows, Hardware], Measure]
    record: type[Measured]
    schema: pa.Schema


def run(run: Run) -> StepResult:
    """Measures both models, and the student's attention where the difficulty reads it; the result is the student's.

    A KD method that trains on stored answers has them made first.
    """
    chain = Chain(run)
    for who in answers_of(run.config.kd_method):
        make_answers(chain, who)
    results = [_measure(chain, who) for who in chain.measured]
    return results[-1]


def _measure(chain: Chain, who: str) -> StepResult:
    key = chain.score_key(who)
    found = chain.store.find(key)
    if found is not None:
        get_logger().info("the %s has been measured: %s", who, found.path)
        return StepResult(found, made=False, figures=dict(found.manifest.extra))
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return StepResult(work.finished, made=False, figures=dict(work.finished.manifest.extra))
        checks.refuse_early(checks.of_measuring(chain, who))
        measured = do_part(f"score_{who}", chain, work)
        artifact = work.commit(
            config=chain.run.resolved,
            inputs={},
            command=chain.run.command,
            seed=chain.config.score.seed if who == "student" else None,
            extra=measured["figures"],
            exclude=[SHARDS, FOLDER, LOCK],
        )
    figures = ", ".join(f"{name} {value:.4g}" for name, value in measured["figures"].items())
    get_logger().info("the %s on %d rows: %s", who, measured["num_rows"], figures)
    return StepResult(artifact, made=True, figures=measured["figures"])


# ── inside each process ───────────────────────────────────────────────────────────────────────────────────────────────


def score_student(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """Cross entropy, an answer and its ROUGE-L of every row; see `_measured`."""
    return _measured(chain, "student", _Measuring(_student_measurer, ScoredRecord, MEASURED), folder, processes)


def score_attention(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """The attention variance of every row under the student; see `_measured`."""
    measuring = _Measuring(_attention_measurer, AttentionRecord, ATTENTION_MEASURED)
    return _measured(chain, "attention", measuring, folder, processes)


def score_teacher(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """Cross entropy of every row; see `_measured`."""
    return _measured(chain, "teacher", _Measuring(_teacher_measurer, ScoredRecord, MEASURED), folder, processes)


def _measured(
    chain: Chain,
    who: str,
    measuring: _Measuring,
    folder: Path,
    processes: Processes,
) -> dict[str, Any]:
    """Leaves `scores.parquet` and `dropped.jsonl` in `folder`, whoever measured which shard; `num_rows` and `figures`.

    A shard is written when it is whole; those of an interrupted run are not measured again.
    """
    hardware = set_up_hardware(chain.config.hardware, rank=processes.local_rank)
    rows = training_rows(chain.config, load_tokenizer(chain.student))
    shards, files = in_shards(rows.train), ShardFiles(folder / SHARDS, "parquet")
    missing = files.missing(shards, processes)
    if missing:
        num_rows = sum(len(ids) for _, ids in missing)
        with (
            memory_errors_explained(hardware, f"measuring the {who}"),
            progress(f"{chain.config.dataset.name}: measuring the {who}", num_rows) as advance,
        ):
            measure = measuring.measurer(chain, rows, hardware)
            for path, ids in missing:
                measured = measure([rows.train.row(record_id) for record_id in ids])
                durable.write_parquet(path, _table(measured, measuring.schema))
                advance(len(ids))
    if not processes.is_first:
        return {}
    by_id = {row["id"]: row for path in files.all(len(shards)) for row in pq.read_table(path).to_pylist()}
    scored = [measuring.record(**by_id[record_id]) for record_id in rows.train.ids]
    _write(folder, rows, scored, measuring.schema)
    return {"num_rows": len(scored), "figures": _figures(scored)}


def _write(folder: Path, rows: TrainingRows, scored: Sequence[Measured], schema: pa.Schema) -> None:
    beginnings = pa.array([rows.records[row.id].beginning for row in scored], INSTRUCTION.type)
    columns = [*_table(scored, schema).columns, beginnings]
    durable.write_parquet(folder / "scores.parquet", pa.table(columns, schema=schema.append(INSTRUCTION)))
    durable.write_jsonl(
        folder / "dropped.jsonl",
        [{"location": row.location, "reason": row.reason, "id": row.id} for row in rows.dropped],
    )


def _teacher_measurer(chain: Chain, rows: TrainingRows, hardware: Hardware) -> Measure:
    """Cross entropy; where the teacher's hidden states on these rows are stored, the same pass stores them."""
    assert chain.teacher is not None, "a chain without a teacher has no teacher to measure"
    num_real = num_real_tokens(load_tokenizer(chain.teacher))
    teacher = teacher_of(
        chain, rows.train, hardware, stored=chain.stores_teacher and not answers_of(chain.config.kd_method)
    )

    def measure(shard: list[TokenisedRow]) -> list[ScoredRecord]:
        measured = measure_teacher(teacher, shard, num_real_tokens=num_real, hardware=hardware)
        _refuse_non_finite(measured, "teacher")
        return measured

    return measure


def _attention_measurer(chain: Chain, rows: TrainingRows, hardware: Hardware) -> Measure:
    """The variance of the student's attention weights, by its own eager attention."""
    loaded = load_model(loadable(chain, chain.student), device=hardware.device, dtype_override=None, dropout=None)
    model = split_model(loaded.model).model

    def measure(shard: list[TokenisedRow]) -> list[AttentionRecord]:
        measured = measure_attention(model, shard, hardware=hardware)
        _refuse_non_finite(measured, "student", ATTENTION)
        return measured

    return measure


def _student_measurer(chain: Chain, rows: TrainingRows, hardware: Hardware) -> Measure:
    """Cross entropy with the prompt and without it, an answer, and the answer's ROUGE-L.

    Of plain text, cross entropy alone.
    """
    config = chain.config
    decoding = DecodingConfig(
        sampling_temperature=config.score.sampling_temperature,
        top_p=1.0,
        top_k=0,
        no_repeat_ngram_size=config.score.no_repeat_ngram_size,
        max_new_tokens=config.score.max_new_tokens,
    )
    loaded = load_model(loadable(chain, chain.student), device=hardware.device, dtype_override=None, dropout=None)
    headed = split_model(loaded.model)
    num_real = num_real_tokens(loaded.tokenizer)

    def measure_text(shard: list[TokenisedRow]) -> list[ScoredRecord]:
        measured = measure_cross_entropy(headed, shard, num_real_tokens=num_real, hardware=hardware)
        _refuse_non_finite(measured, "student")
        return measured

    def measure(shard: list[TokenisedRow]) -> list[ScoredRecord]:
        measured, (answers,) = measure_and_answer(
            headed, loaded, shard, decoding=decoding, seeds=[config.score.seed], purpose="score", hardware=hardware
        )
        alone = measure_cross_entropy(
            headed,
            [replace(row, prompt_ids=(_first_token(loaded),)) for row in shard],
            num_real_tokens=num_real,
            hardware=hardware,
        )
        _refuse_non_finite([*measured, *alone], "student")
        return [
            replace(
                row,
                generation=one.text,
                rouge_l=rouge_l(one.text, rows.records[row.id].references),
                cross_entropy_alone=without.cross_entropy,
            )
            for row, one, without in zip(measured, answers, alone, strict=True)
        ]

    return measure if config.dataset.has_prompts else measure_text


def _first_token(loaded: LoadedModel) -> int:
    """The token that begins a text, so that a response can be read alone: BOS, or EOS where there is none."""
    begins = loaded.tokenizer.bos_token_id
    return int(begins) if begins is not None else min(loaded.eos_token_ids)


def _refuse_non_finite(measured: Sequence[Measured], who: str, column: str = "cross_entropy") -> None:
    bad = [row.id for row in measured if not math.isfinite(getattr(row, column))]
    if bad:
        raise NonFiniteError(
            f"the {who}'s {column.replace('_', ' ')} is not finite",
            where=f"records {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}",
            fix=f"check the {who}'s weights, or use {who}.dtype=float32 hardware.precision=float32",
        )


def _table(scored: Sequence[Measured], schema: pa.Schema) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in scored] for name in schema.names}
    return pa.table(columns, schema=schema)


def _figures(scored: Sequence[Measured]) -> dict[str, Any]:
    """Means over the rows, of cross entropy over the response tokens: what a person looks at first."""
    attention = [row.attention_variance for row in scored if isinstance(row, AttentionRecord)]
    if attention:
        return {ATTENTION: math.fsum(attention) / len(attention)}
    rows = [row for row in scored if isinstance(row, ScoredRecord)]
    tokens = sum(row.num_response_tokens for row in rows)
    figures = {"cross_entropy": math.fsum(r.cross_entropy * r.num_response_tokens for r in rows) / tokens}
    rouge = [row.rouge_l for row in rows if row.rouge_l is not None]
    if rouge:
        figures["rouge_l"] = 100 * math.fsum(rouge) / len(rouge)
    return figures
