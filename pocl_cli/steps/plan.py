"""`pocl distill plan=true`: the stage table and what a run would cost; writes nothing."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pocl_cli import tables
from pocl_cli.data.template import encode
from pocl_cli.errors import ArtifactError, ResourceError
from pocl_cli.records import TokenisedRow
from pocl_cli.steps.stages import planned_table, training_records
from pocl_cli.training.checkpoint import KEPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocl_cli.curriculum.stage_table import StageRow
    from pocl_cli.models.source import ModelSource
    from pocl_cli.records import Record
    from pocl_cli.schema import PoclConfig
    from pocl_cli.steps.chain import Chain

SAMPLE_ROWS = 200
# Bytes per parameter of a student in training: weights, gradients and AdamW's two moments in float32.
TRAINING_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, those of its embeddings apart, and what its activations take a token in bytes."""

    parameters: int
    embedding: int
    activation_bytes: int
    weight_bytes: int


class _Tokens(NamedTuple):
    """Tokens of prompts and responses together, and of responses alone."""

    total: float
    response: float


def show(chain: Chain) -> None:
    """Prints the resolved stage table and estimates of tokens, memory, disk and time, as far as they can be known."""
    config = chain.config
    chain = replace(chain, run=replace(chain.run, config=config.model_copy(update={"upstream": "require"})))
    records = None if config.plan.num_rows is not None else training_records(config)
    num_rows = config.plan.num_rows if records is None else len(records)
    assert num_rows is not None, "the rows are given or loaded"
    table = planned_table(chain, num_rows)
    tables.stage_table(table)
    tables.summary_panel("plan", _estimates(chain, table, records))


def _estimates(chain: Chain, table: Sequence[StageRow], records: Sequence[Record] | None) -> dict[str, Any]:
    config = chain.config
    steps = sum(row["steps"] for row in table)
    sequences = sum(
        min(row["steps"] * config.train.global_batch_size, row["epochs"] * row["num_rows"]) for row in table
    )
    estimates: dict[str, Any] = {"steps": steps, "sequences": sequences}
    if records is None:
        tokens = sequences * config.dataset.max_tokens
        estimates["tokens at most"] = tokens
        estimates["memory, disk, time"] = "not known without data and models; leave out plan.num_rows"
        return estimates
    try:
        student = chain.student
        teacher = chain.teacher if config.kd_method.needs_teacher else None
        rows = _sample(config, student, records)
        sizes = {"student": _sizes(student)} | ({"teacher": _sizes(teacher)} if teacher else {})
    except (ArtifactError, ResourceError) as error:
        estimates["tokens, memory, disk, time"] = f"not known: {error}"
        return estimates
    mean = statistics.fmean(row.num_tokens for row in rows)
    response = statistics.fmean(len(row.response_ids) for row in rows)
    estimates["tokens (prompt + response)"] = round(sequences * mean)
    estimates["response tokens"] = round(sequences * response)
    once = _Tokens(len(records) * mean, len(records) * response) if chain.stores_teacher else None
    return estimates | _costs(chain, sizes, _Tokens(sequences * mean, sequences * response), once)


def _sample(config: PoclConfig, student: ModelSource, records: Sequence[Record]) -> list[TokenisedRow]:
    """Evenly spaced rows as token ids, without the cache: a plan writes nothing."""
    from pocl_cli.models.load import load_tokenizer

    tokenizer, dataset = load_tokenizer(student), config.dataset
    chosen = records[:: max(1, len(records) // SAMPLE_ROWS)]
    rows = [
        encode(record, tokenizer, dataset.max_tokens, dataset.max_prompt_tokens, dataset.long_prompts)
        for record in chosen
    ]
    return [row for row in rows if isinstance(row, TokenisedRow)]


def _sizes(source: ModelSource) -> Sizes:
    """Counts the parameters of a model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from pocl_cli.models.load import read_config

    config = read_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    text = config.get_text_config()
    # Kept for the backward pass of a decoder layer: about 16 vectors of the hidden size a token, in float32.
    activations = 16 * 4 * text.hidden_size * text.num_hidden_layers
    bits16 = str(config.dtype or "float32").endswith("16")
    return Sizes(sum(p.numel() for p in model.parameters()), embedding, activations, 2 if bits16 else 4)


def _costs(chain: Chain, sizes: dict[str, Sizes], trained: _Tokens, once: _Tokens | None) -> dict[str, Any]:
    """Memory, disk and time of a run over `trained` tokens; `once`: the rows' own, where the teacher is stored."""
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.steps.teacher import stored_sizes

    hardware = set_up_hardware(chain.config.hardware)
    student, teacher = sizes["student"], sizes.get("teacher")
    memory = student.parameters * TRAINING_BYTES + student.activation_bytes * hardware.max_tokens_per_micro_batch
    memory += hardware.objective_memory_mb * 2**20
    # The backward pass costs twice the forward.
    work = 3 * _multiply_adds(student, trained)
    # While a checkpoint is saved: one more than are kept, each with two moments, a best state for each, and the model.
    disk: float = student.parameters * 4 * (4 * (KEPT + 1) + 1)
    kept: float = student.parameters * 4
    details = {}
    if teacher and not once:
        memory += teacher.parameters * teacher.weight_bytes
        work += _multiply_adds(teacher, trained)
    if teacher and once:
        assert chain.teacher is not None, "sizes hold a teacher"
        stored_size = stored_sizes(chain.teacher)
        stored = stored_size.head + once.response * stored_size.token
        memory += stored_size.head
        disk, kept = disk + stored, kept + stored
        work += _multiply_adds(teacher, once) + teacher.embedding * trained.response
        filling = memory + teacher.parameters * teacher.weight_bytes
        details["teacher's hidden states (estimate)"] = (
            f"{_gib(stored)} on disk, computed once for all runs; where they are not there yet, the teacher is loaded "
            f"and memory rises to {_gib(filling)}"
        )
    return {
        "memory (estimate)": f"{_gib(memory)} on {hardware.device}",
        "disk (estimate)": f"{_gib(disk)} while it runs, {_gib(kept)} kept",
        **details,
        "training (estimate)_seconds": work / _multiply_adds_per_second(hardware.device),
        "not counted": "dev evaluations, scoring",
    }


def _multiply_adds(model: Sizes, tokens: _Tokens) -> float:
    """Of a forward pass: the backbone for every token, the output layer for response tokens."""
    return (model.parameters - model.embedding) * tokens.total + model.embedding * tokens.response


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _multiply_adds_per_second(device: Any) -> float:
    """The machine's rate for float32 matrix products of a language model's shapes, measured now."""
    import torch

    left, right = torch.randn(512, 576, device=device), torch.randn(576, 1536, device=device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(8):
            product = left @ right
        float(product[0, 0])
        seconds.append(time.perf_counter() - started)
    return 8 * 512 * 576 * 1536 / statistics.median(seconds)
