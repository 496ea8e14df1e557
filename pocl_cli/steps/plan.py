"""`pocl distill plan=true`: the stage table and what a run would cost; writes nothing."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pocl_cli import tables
from pocl_cli.data.encoder import encoder_of
from pocl_cli.errors import PoclError
from pocl_cli.records import TokenisedRow, answers_of, generates, may_end_early
from pocl_cli.steps import checks
from pocl_cli.steps.costs import Sizes, gib, multiply_adds, sizes_of, training_disk, training_memory
from pocl_cli.steps.stages import planned_table, training_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocl_cli.curriculum.stage_table import StageRow
    from pocl_cli.models.source import ModelSource
    from pocl_cli.records import Record
    from pocl_cli.schema import PoclConfig
    from pocl_cli.steps.chain import Chain

SAMPLE_ROWS = 200


class _Tokens(NamedTuple):
    """Tokens of prompts and responses together, and of responses alone."""

    total: float
    response: float


def show(chain: Chain) -> None:
    """Prints the resolved stage table, what would stop the run, and estimates, as far as they can be known."""
    config = chain.config
    chain = replace(chain, run=replace(chain.run, config=config.model_copy(update={"upstream": "require"})))
    records = None if config.plan.num_rows is not None else training_records(config)
    num_rows = config.plan.num_rows if records is None else len(records)
    assert num_rows is not None, "the rows are given or loaded"
    if records is not None and not config.dataset.has_prompts:
        num_rows = len(_encoded(config, chain.student, records))
    table = planned_table(chain, num_rows)
    tables.stage_table(table)
    if records is not None:
        rows = _by_finding(checks.verdicts(checks.of_plan(chain)))
        tables.results_table("Checks, before any weights are read", ["check", "verdict", "finding"], rows)
    tables.summary_panel("plan", _estimates(chain, table, records, num_rows))


def _by_finding(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """One row for all checks that found the same: a missing model stops many."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, verdict, finding in rows:
        names.setdefault((verdict, finding), []).append(name)
    return [(", ".join(of_finding), *found) for found, of_finding in names.items()]


def _estimates(
    chain: Chain, table: Sequence[StageRow], records: Sequence[Record] | None, num_rows: int
) -> dict[str, Any]:
    config = chain.config
    steps = sum(row["steps"] for row in table)
    sequences = sum(
        min(row["steps"] * config.train.global_batch_size, row["epochs"] * row["num_rows"]) for row in table
    )
    estimates: dict[str, Any] = {"steps": steps, "sequences": sequences}
    if may_end_early(config.curriculum):
        estimates["these are the most"] = "stages may end early (curriculum.convergence)"
    if records is None:
        tokens = sequences * config.dataset.max_tokens
        estimates["tokens at most"] = tokens
        for who in answers_of(config.kd_method):
            estimates[f"answers of the {who}"] = f"to {num_rows:,} rows, made before training"
        estimates["memory, disk, time"] = "not known without data and models; leave out plan.num_rows"
        return estimates
    try:
        student = chain.student
        rows = _encoded(config, student, records[:: max(1, len(records) // SAMPLE_ROWS)])
        mean = statistics.fmean(row.num_tokens for row in rows)
        response = statistics.fmean(len(row.response_ids) for row in rows)
        estimates["tokens (prompt + response)"] = round(sequences * mean)
        estimates["response tokens"] = round(sequences * response)
        if generates(config.kd_method):
            estimates["the student's answers (estimate)"] = "as long as the responses of the rows"
        once = _Tokens(num_rows * mean, num_rows * response)
        estimates |= _answers(chain, once)
        # Each row counts once for each model whose answer to it is trained on.
        times = max(1, len(answers_of(config.kd_method)))
        trained = _Tokens(times * sequences * mean, times * sequences * response)
        stored = _Tokens(times * once.total, times * once.response)
        return estimates | _costs(chain, _taught_shares(chain, table), trained, stored)
    except PoclError as error:
        return estimates | {"tokens, memory, disk, time": f"not known: {error}"}


def _answers(chain: Chain, once: _Tokens) -> dict[str, Any]:
    """Whether the answers that the KD method trains on are there, and what making them takes.

    They are taken to be as long as the gold responses, of which `once` counts the tokens.
    """
    from pocl_cli.models.device import set_up_hardware

    found: dict[str, Any] = {}
    for who in answers_of(chain.config.kd_method):
        artifact = chain.store.find(chain.answers_key(who))
        if artifact is not None:
            found[f"answers of the {who}"] = f"stored: {artifact.path.name}"
            continue
        work = multiply_adds(sizes_of(chain.model(who)), once)
        seconds = work / _multiply_adds_per_second(set_up_hardware(chain.config.hardware).device)
        found[f"answers of the {who}"] = "made first (pocl score, or upstream=auto)"
        found[f"answers of the {who} (estimate)_seconds"] = seconds
    return found


def _encoded(config: PoclConfig, student: ModelSource, records: Sequence[Record]) -> list[TokenisedRow]:
    """The rows of records as token ids, without the cache: a plan writes nothing."""
    from pocl_cli.models.load import load_tokenizer

    rows = encoder_of(load_tokenizer(student), config.dataset).encode_batch(records)
    return [row for row in rows if isinstance(row, TokenisedRow)]


def _taught_shares(chain: Chain, table: Sequence[StageRow]) -> list[tuple[Chain, float]]:
    """The chain of every teacher, and the share of the steps that it teaches."""
    if not chain.lessons:
        return [(one, 1.0) for one in chain.taught]
    total = max(sum(row["steps"] for row in table), 1)
    taught = list(zip(chain.lessons, table, strict=True))
    return [(one, sum(row["steps"] for lesson, row in taught if lesson is one) / total) for one in chain.taught]


def _costs(chain: Chain, teachers: Sequence[tuple[Chain, float]], trained: _Tokens, once: _Tokens) -> dict[str, Any]:
    """Memory, disk and time of a run over `trained` tokens; `once`: those of the rows, on which a teacher is stored.

    `teachers`: the chain of each, and the share of the tokens that it is asked for.
    """
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.steps.teacher import stored_sizes

    hardware = set_up_hardware(chain.config.hardware)
    student = sizes_of(chain.student, chain.config.student.lora)
    # The backward pass costs the forward once for the states and once for the weights that are trained.
    work = (2 + student.trained / student.parameters) * multiply_adds(student, trained)
    stored, head, filling = 0.0, 0, 0
    running: Sizes | None = None
    for taught, part in teachers:
        source = taught.model("teacher")
        teacher, asked = sizes_of(source), _Tokens(part * trained.total, part * trained.response)
        if not taught.stores_teacher:
            work += multiply_adds(teacher, asked)
            running = max(running or teacher, teacher, key=lambda sizes: sizes.weights)
            continue
        stored_size = stored_sizes(source)
        stored += stored_size.head + once.response * stored_size.token
        head, filling = max(head, stored_size.head), max(filling, stored_size.head + teacher.weights)
        work += multiply_adds(teacher, once) + teacher.embedding * asked.response
    bare = training_memory(student, running, hardware, chain.config.hardware.num_parts).estimate
    disk, kept = training_disk(student).estimate + stored, student.parameters * 4 + stored
    details = {}
    if stored:
        details["teacher's hidden states (estimate)"] = (
            f"{gib(stored)} on disk, computed once for all runs; where they are not there yet, the teacher is loaded "
            f"and memory rises to {gib(bare + filling)}"
        )
    answers = ["the student's answers"] if generates(chain.config.kd_method) else []
    return {
        "memory (estimate)": f"{gib(bare + head)} on {hardware.device}",
        "disk (estimate)": f"{gib(disk)} while it runs, {gib(kept)} kept",
        **details,
        "training (estimate)_seconds": work / _multiply_adds_per_second(hardware.device),
        "not counted": ", ".join(["dev evaluations", "scoring", *answers]),
    }


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
