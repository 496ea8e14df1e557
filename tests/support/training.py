"""A tiny distillation run of real parts: toy rows, a random GPT-2 student, a random Llama teacher, the real loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pocl_cli.curriculum.stage_table import stage_table
from pocl_cli.data.generators.toy import ToyInstructions
from pocl_cli.data.template import RowEncoder
from pocl_cli.models.build import build_config, build_model
from pocl_cli.models.device import Hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import set_dropout
from pocl_cli.models.teacher import OnlineTeacher
from pocl_cli.models.toy_tokenizer import build_toy_tokenizer
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.records import Record, Stage, TokenisedRow, answers_of
from pocl_cli.registry import kd_methods
from pocl_cli.training.answered_rows import AnsweredRows
from pocl_cli.training.loop import LoopSettings, TrainingJob
from pocl_cli.training.measure import measure_cross_entropy
from pocl_cli.training.replay import Replay
from pocl_cli.training.rollout import Rollout
from pocl_cli.training.student import StudentWithObjective

CONF = Path(__file__).parents[2] / "conf"
STUDENT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
TEACHER = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SETTINGS = LoopSettings(
    seed=7,
    lr=4e-3,
    lr_end=4e-5,
    weight_decay=0.01,
    grad_clip=1.0,
    global_batch_size=4,
    drop_last=False,
    log_every=1,
    checkpoint_every=1000,
    evaluate_every=1,
    keep_best=False,
    max_tokens_per_micro_batch=4096,
)
HARDWARE = Hardware(torch.device("cpu"), "float32", max_tokens_per_micro_batch=4096, objective_memory_mb=512)


@cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    return build_toy_tokenizer()


@cache
def toy_rows(num_rows: int) -> tuple[TokenisedRow, ...]:
    """Rows of the toy data set as token ids, with the ids r00, r01, …"""
    encoder = RowEncoder(toy_tokenizer(), 64, 48, "drop")
    drawn = ToyInstructions().rows("train", num_rows, 0)
    records = [Record(f"r{i:02d}", row["instruction"], row["input"], (row["output"],)) for i, row in enumerate(drawn)]
    rows = [row for row in encoder.encode_batch(records) if isinstance(row, TokenisedRow)]
    assert len(rows) == num_rows, "no toy row is dropped"
    return tuple(rows)


def make_model(
    architecture: Mapping[str, Any], seed: int, *, dtype: torch.dtype = torch.float32, dropout: float | None = 0.0
) -> PreTrainedModel:
    """A random model over the toy vocabulary, with weights large enough to make its answers differ."""
    config = build_config(architecture, toy_tokenizer())
    set_dropout(config, dropout)
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return nn.Module.to(model, dtype)


@cache
def _prototype(method: str, dtype: torch.dtype, dropout: float, memory_mb: float) -> StudentWithObjective:
    values = yaml.safe_load((CONF / "kd_method" / f"{method}.yaml").read_text(encoding="utf-8"))
    padded = num_real_tokens(toy_tokenizer()) + 3
    teacher = make_model({**TEACHER, "vocab_size": padded + 4}, 2, dtype=dtype, dropout=None)
    return StudentWithObjective(
        split_model(make_model({**STUDENT, "vocab_size": padded}, 1, dtype=dtype, dropout=dropout)),
        method=kd_methods.build(values),
        teacher=OnlineTeacher(split_model(teacher)),
        num_real_tokens=num_real_tokens(toy_tokenizer()),
        hardware=replace(HARDWARE, objective_memory_mb=memory_mb),  # type: ignore[arg-type] # less than the schema's 1
    )


def make_student(
    method: str = "fkl", *, dtype: torch.dtype = torch.float32, dropout: float = 0.0, memory_mb: float = 512
) -> StudentWithObjective:
    """A fresh student with the objective of a shipped method and its teacher; both output layers are padded."""
    return copy.deepcopy(_prototype(method, dtype, dropout, memory_mb))


@dataclass
class RowsById:
    """Training rows in memory."""

    rows: Sequence[TokenisedRow]
    by_id: dict[str, TokenisedRow] = field(init=False)

    def __post_init__(self) -> None:
        self.by_id = {row.id: row for row in self.rows}

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(row.id for row in self.rows)

    def row(self, record_id: str) -> TokenisedRow:
        return self.by_id[record_id]

    def num_tokens(self, record_id: str) -> int:
        return self.by_id[record_id].num_tokens


def make_answers(who: str, rows: Sequence[TokenisedRow]) -> AnsweredRows:
    """Made-up stored answers of a model to `rows`, some of them empty and some cut."""
    length, gold = {"teacher": 5, "student": 7}[who], RowsById(rows)
    lists = [[(7 * place + step) % 90 + 5 for step in range((place * length) % 9)] for place in range(len(rows))]
    ended = [not tokens or place % 3 > 0 for place, tokens in enumerate(lists)]
    column = pa.chunked_array([pa.array(lists, pa.list_(pa.int32()))])
    return AnsweredRows(who, gold, column, pa.chunked_array([pa.array(ended)]), eos_id=toy_tokenizer().eos_token_id)


def two_stages(rows: Sequence[TokenisedRow], *, epochs: int = 2) -> list[Stage]:
    """Stage 0 on the first half of the rows, stage 1 on all; temperature and kd_ratio rise."""
    ids = tuple(row.id for row in rows)
    return [Stage(0, ids[: len(ids) // 2], epochs, 1.0, 0.7), Stage(1, ids, epochs, 2.0, 1.0)]


def make_job(
    folder: Path,
    *,
    student: StudentWithObjective | None = None,
    rows: Sequence[TokenisedRow] | None = None,
    stages: Sequence[Stage] | None = None,
    max_steps: int | None = None,
    evaluates: bool = False,
    track: Callable[[Mapping[str, Any], int], None] = lambda values, step: None,
    **settings: Any,
) -> TrainingJob:
    """A job over 12 toy rows in two stages of 2 epochs (4 + 6 steps); keywords replace the settings of the loop."""
    student = make_student() if student is None else student
    rows = toy_rows(12) if rows is None else rows
    stages = two_stages(rows) if stages is None else stages
    chosen = replace(SETTINGS, **settings)
    table = stage_table(
        stages,
        global_batch_size=chosen.global_batch_size,
        drop_last=chosen.drop_last,
        lr=chosen.lr,
        lr_end=chosen.lr_end,
        max_steps=max_steps,
    )
    return TrainingJob(
        student=student,
        stages=stages,
        table=table,
        rows=RowsById(rows),
        settings=chosen,
        folder=folder,
        evaluate_dev=(lambda stage: dev_figures(student)) if evaluates else None,
        rollout=make_rollout(student, chosen.seed) if getattr(student.method, "generates", False) else None,
        answers={who: make_answers(who, rows) for who in answers_of(student.method)},
        replay=make_replay(student, rows, chosen.seed) if hasattr(student.method, "buffer_size") else None,
        track=track,
    )


def make_rollout(student: StudentWithObjective, seed: int) -> Rollout:
    """As the toy tokenizer and the data set have it, with answers of at most 12 tokens, of which some end before."""
    method: Any = student.method
    return Rollout(
        decoding=method.decoding.model_copy(update={"max_new_tokens": 12}),
        seed=seed,
        eos_token_ids={toy_tokenizer().eos_token_id},
        pad_token_id=0,
        max_tokens=64,
        teacher_mix=getattr(method, "teacher_mix", 0.0),
    )


def make_replay(student: StudentWithObjective, rows: Sequence[TokenisedRow], seed: int) -> Replay:
    """A buffer of answers to the prompts of `rows`."""
    size = student.method.buffer_size  # type: ignore[attr-defined]
    return Replay(RowsById(rows), size=size, seed=seed, eos_token_ids={toy_tokenizer().eos_token_id})


def dev_figures(student: StudentWithObjective) -> dict[str, float]:
    """Figures of six dev rows that depend on the weights alone; `dev_rouge_l` is coarse, so that it ties."""
    dev = toy_rows(18)[12:]
    measured = measure_cross_entropy(student.headed, dev, num_real_tokens=student.num_real_tokens, hardware=HARDWARE)
    mean = sum(row.cross_entropy for row in measured) / len(measured)
    return {"dev_rouge_l": float(round(40 - 5 * mean)), "dev_cross_entropy": mean}


# ── what a run left behind ────────────────────────────────────────────────────────────────────────────────────────


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder) if "loss" in line]


def dev_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder) if "loss" not in line]


def read_consumed(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "consumed.parquet").to_pylist()
    return rows


def weights(student: StudentWithObjective) -> dict[str, torch.Tensor]:
    """A copy of the student's parameters."""
    return {name: value.detach().clone() for name, value in student.backbone.named_parameters()}


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two copies hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
