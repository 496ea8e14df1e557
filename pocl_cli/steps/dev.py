"""The figures of a student on the dev rows while it trains, and those of the state that is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pocl_cli.evaluation.metrics import perplexity
from pocl_cli.evaluation.rouge import rouge_l
from pocl_cli.models.device import Hardware
from pocl_cli.models.load import LoadedModel
from pocl_cli.records import Record, TokenisedRow
from pocl_cli.schema import PoclConfig
from pocl_cli.steps.answers import measure_and_answer
from pocl_cli.steps.rows import TrainingRows
from pocl_cli.training.measure import measure_cross_entropy
from pocl_cli.training.parallel import Processes
from pocl_cli.training.sampler import share
from pocl_cli.training.state import quality
from pocl_cli.training.student import StudentWithObjective


def dev_figures(
    config: PoclConfig,
    student: StudentWithObjective,
    loaded: LoadedModel,
    rows: TrainingRows,
    hardware: Hardware,
    processes: Processes,
    stage: int,
) -> dict[str, float]:
    """Cross entropy and, by generation, ROUGE-L on the stage's dev rows, of which each process measures a share.

    Of plain text, cross entropy and perplexity.
    """
    assert rows.dev is not None, "no dev rows"
    limit = config.train.dev_rows
    ids = rows.dev.ids[: limit[stage] if isinstance(limit, tuple) else limit]
    places = {row_id: place for place, row_id in enumerate(ids)}
    own = share([rows.dev.row(row_id) for row_id in places], processes.rank, processes.size)
    table = torch.zeros(len(places), 5, dtype=torch.float64)
    if config.dataset.has_prompts:
        measured = _answered(config, student, loaded, own, rows.records, hardware)
    else:
        measured = _read(student, own, hardware)
    for row_id, figures in measured.items():
        table[places[row_id], : len(figures)] = torch.tensor(figures)
    nats, num_tokens, scores, lengths, ended = (math.fsum(column) for column in processes.sum(table).T.tolist())
    cross_entropy = nats / num_tokens
    if not config.dataset.has_prompts:
        return {"dev_cross_entropy": cross_entropy, "dev_perplexity": perplexity(cross_entropy)}
    return {
        "dev_cross_entropy": cross_entropy,
        "dev_rouge_l": 100 * scores / len(places),
        "dev_response_tokens": lengths / len(places),
        "dev_ended_with_eos": 100 * ended / len(places),
    }


def kept_dev_figures(folder: Path, keep_best: bool) -> dict[str, float]:
    """The dev figures of the state that is kept: the best of the last stage, or the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dev = [line for line in lines if "dev_cross_entropy" in line]
    if not dev:
        return {}
    kept = dev[-1]
    if keep_best:
        of_stage = [line for line in dev if line["stage"] == kept["stage"] and line["step"] > 0] or [kept]
        kept = max(of_stage, key=quality)
    return {name: kept[name] for name in ("dev_rouge_l", "dev_cross_entropy", "dev_perplexity") if name in kept}


def _answered(
    config: PoclConfig,
    student: StudentWithObjective,
    loaded: LoadedModel,
    own: Sequence[TokenisedRow],
    records: Mapping[str, Record],
    hardware: Hardware,
) -> dict[str, list[float]]:
    """Of each row: nats and tokens of its response; ROUGE-L, length and end of an answer."""
    measured, (answers,) = measure_and_answer(
        student.headed,
        loaded,
        own,
        decoding=config.train.dev_decoding,
        seeds=[config.train.seed],
        purpose="dev",
        hardware=hardware,
    )
    return {
        row.id: [
            row.cross_entropy * row.num_response_tokens,
            row.num_response_tokens,
            rouge_l(one.text, records[row.id].references),
            one.num_tokens,
            one.ended,
        ]
        for row, one in zip(measured, answers, strict=True)
    }


def _read(student: StudentWithObjective, own: Sequence[TokenisedRow], hardware: Hardware) -> dict[str, list[float]]:
    """Of each row: nats and tokens of its response."""
    measured = measure_cross_entropy(student.headed, own, num_real_tokens=student.num_real_tokens, hardware=hardware)
    return {row.id: [row.cross_entropy * row.num_response_tokens, row.num_response_tokens] for row in measured}
