"""A whole run in four stages: `pocl distill` beside the reference formulation's loop over the same batches.

    python benchmarks/whole_run.py                                small made-up model and rows
    python benchmarks/whole_run.py --model FOLDER --rows FILE     a real one

Ours is the command itself, from its start to its end, the models' loading and the teacher's work included, on a random
partition and without dev evaluation, every step logged. The reference is a restatement: the same
stages and batches in the same order, every row padded to one length, full logits of both models at every step. Unless
`--all-steps` is given it makes only some of its steps, evenly spaced over the run, and the seconds of the others are
taken to be as many on average.
Exit code 1: the two disagree about the loss of step 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage, struct_rusage
from typing import TYPE_CHECKING, Any

import entry
import measuring
import results
from cases import make_model_and_rows
from comparing import TOLERANCE
from pocl_cli import tables
from sides import padded, reference_loss

if TYPE_CHECKING:
    from pocl_cli.models.load import LoadedModel
    from pocl_cli.records import Stage, TokenisedRow

METHOD = "fkl"
MIN_SAMPLED_STEPS = 12
# Columns that a terminal has no room for.
JSON_ONLY = ("measured_steps", "first_loss")
STARTS_POCL = "import sys; from pocl_cli.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Figures:
    """What a side needed.

    Attributes:
        steps: of the whole run; `measured_steps` is how many of them were made and timed.
        step_seconds: wall time of those on average; `seconds` is that of the whole run.
        first_loss: of step 1, in nats per response token.
    """

    side: str
    steps: int
    measured_steps: int
    step_seconds: float
    seconds: float
    cpu_seconds: float
    peak_gb: float
    first_loss: float


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step of the run: `index` counts from 0 over all stages, `stage_step` inside its stage."""

    index: int
    stage: Stage
    stage_step: int
    stage_steps: int
    rows: Sequence[TokenisedRow]


def main(arguments: Sequence[str]) -> int:
    """Runs both sides and draws the table. Returns the exit code."""
    options = options_of(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, rows = options.model, options.rows
        if model is None:
            model, rows = folder / "model", folder / "rows.jsonl"
            measuring.in_fresh_process("making the small model", make_model_and_rows, model, rows, options.num_rows)
        overrides = overrides_of(options, model.resolve(), rows.resolve(), folder / "outputs")
        # A random partition takes no model; it is not a part of what is compared.
        _pocl("partition", overrides)
        ours = run_ours(overrides)
        num_sampled = None if options.all_steps else options.sampled_steps
        what = "the reference's loop"
        reference = measuring.in_fresh_process(what, run_reference, overrides, num_sampled)
    return _show([reference, ours], "" if options.model is None else f"-{options.model.name}", options)


def overrides_of(options: argparse.Namespace, model: Path, rows: Path, outputs: Path) -> list[str]:
    """The run's overrides: both sides compose it from these."""
    return [
        "dataset=local", f"dataset.path={rows}", f"dataset.limit={options.num_rows}", "dataset.dev_size=0",
        "teacher=smollm2-360m", f"teacher.path={model}", "teacher.dtype=float32",
        "student=smollm2-135m", f"student.path={model}", f"student.layers={options.layers}", "student.dropout=0",
        f"kd_method={METHOD}", "curriculum=baby_step", f"curriculum.epochs_per_stage={options.epochs}",
        "difficulty=random", f"train.global_batch_size={options.batch_size}", "train.evaluate_every=0",
        "train.log_every=1",
        "hardware=cpu", f"paths.outputs={outputs}", *options.override,
    ]  # fmt: skip


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_ours(overrides: Sequence[str]) -> Figures:
    """`pocl distill` in a process of its own."""
    started = time.perf_counter()
    artifact, usage = _pocl("distill", overrides)
    return figures_of(artifact, time.perf_counter() - started, usage)


def figures_of(artifact: Path, seconds: float, usage: struct_rusage) -> Figures:
    """What the run that made `artifact` needed; its process used `usage`."""
    metrics, timings = (_lines(artifact / name) for name in ("metrics.jsonl", "timings.jsonl"))
    assert metrics[0]["step"] == 1, "there is no dev line before step 1"
    return Figures(
        "pocl distill",
        steps=len(metrics),
        measured_steps=len(metrics),
        step_seconds=statistics.fmean(line["seconds"] for line in timings),
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_gb=measuring.peak_gb(usage),
        first_loss=metrics[0]["loss"],
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pocl(command: str, overrides: Sequence[str]) -> tuple[Path, struct_rusage]:
    """Runs `pocl COMMAND`; the artifact that it made, and what the process used. Ends the program where it fails."""
    process = subprocess.Popen([sys.executable, "-c", STARTS_POCL, command, *overrides], stdout=subprocess.PIPE)
    assert process.stdout is not None, "it is piped"
    printed = process.stdout.read().decode()
    # `wait4` is the only call that tells the peak memory of one child.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return Path(printed.strip()), usage


# ── the reference ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_reference(overrides: Sequence[str], num_sampled: int | None) -> Figures:
    """The reference's loop over the run's batches; None makes every step."""
    import torch
    from hydra import initialize_config_dir

    from pocl_cli.config import compose_run, conf_dir
    from pocl_cli.curriculum.learning_rate import cosine
    from pocl_cli.models.load import load_model
    from pocl_cli.models.vocabulary import num_real_tokens
    from pocl_cli.steps.chain import Chain
    from pocl_cli.training.optimizer import make_optimizer

    started = time.perf_counter(), time.process_time()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        chain = Chain(compose_run("distill", overrides))
    config, device = chain.config, torch.device("cpu")
    assert chain.teacher is not None, "forward KL has a teacher"
    student = load_model(chain.student, device=device, dtype_override=torch.float32, dropout=0.0)
    teacher = load_model(chain.teacher, device=device, dtype_override=None, dropout=None)
    num_tokens = num_real_tokens(student.tokenizer)
    planned = list(planned_steps(chain, student))
    sampled = planned if num_sampled is None else evenly_spaced(planned, num_sampled)
    loading = time.perf_counter() - started[0], time.process_time() - started[1]

    losses, stage, optimizer = [], None, None
    started = time.perf_counter(), time.process_time()
    for one in sampled:
        if one.stage is not stage:
            stage = one.stage
            optimizer = make_optimizer(student.model, lr=config.train.lr, weight_decay=config.train.weight_decay)
        assert optimizer is not None, "the first step begins a stage"
        for group in optimizer.param_groups:
            group["lr"] = cosine(one.stage_step, one.stage_steps, start=config.train.lr, end=config.train.lr_end)
        student.model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = reference_loss(
            student.model,
            teacher.model,
            padded(one.rows, config.dataset.max_tokens, student.pad_token_id),
            method=config.kd_method,
            kd_ratio=one.stage.kd_ratio,
            temperature=one.stage.temperature,
            num_real_tokens=num_tokens,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), config.train.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    stepping = time.perf_counter() - started[0], time.process_time() - started[1]
    share = len(planned) / len(sampled)
    return Figures(
        "reference",
        steps=len(planned),
        measured_steps=len(sampled),
        step_seconds=stepping[0] / len(sampled),
        seconds=loading[0] + stepping[0] * share,
        cpu_seconds=loading[1] + stepping[1] * share,
        peak_gb=measuring.peak_gb(getrusage(RUSAGE_SELF)),
        first_loss=losses[0],
    )


def planned_steps(chain: Any, student: LoadedModel) -> Iterator[PlannedStep]:
    """Every optimizer step of the run with its rows, in the order in which `pocl distill` takes them."""
    from pocl_cli.steps.partition import read_partition
    from pocl_cli.steps.rows import training_rows
    from pocl_cli.steps.stages import stages_of
    from pocl_cli.training.sampler import Sampler

    train = chain.config.train
    rows = training_rows(chain.config, student.tokenizer).train
    partition = chain.store.find(chain.partition_key)
    stages = chain.config.curriculum(read_partition(chain.store, partition))
    counter = itertools.count()
    for stage, listed in zip(stages, stages_of(train, stages), strict=True):
        sampler = Sampler(stage, seed=train.seed, global_batch_size=train.global_batch_size, drop_last=train.drop_last)
        for step in range(listed["steps"]):
            batch = [rows.row(record_id) for record_id in sampler.global_batch(step)]
            yield PlannedStep(next(counter), stage, step, listed["steps"], batch)


def evenly_spaced(planned: Sequence[PlannedStep], count: int) -> list[PlannedStep]:
    """`count` of the steps, the first and the last among them; all where there are no more."""
    last = len(planned) - 1
    if count > last:
        return list(planned)
    return [planned[round(i * last / (count - 1))] for i in range(count)]


# ── command line and table ────────────────────────────────────────────────────────────────────────────────────────────


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A whole run of four stages, the reference's way and ours.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the teacher; default: a small one made here")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows to train on, with --model")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model that the student keeps (6)")
    parser.add_argument("--num-rows", type=int, default=200, help="rows of the last stage (200)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over a stage's rows (2)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows an optimizer step (8)")
    sampled = f"steps that the reference makes, evenly spaced ({MIN_SAMPLED_STEPS}, and no fewer)"
    parser.add_argument("--sampled-steps", type=int, default=MIN_SAMPLED_STEPS, metavar="N", help=sampled)
    parser.add_argument("--all-steps", action="store_true", help="the reference makes all of its steps")
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="further overrides of the run, for both sides")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.rows is None):
        parser.error("--model and --rows go together")
    if options.sampled_steps < MIN_SAMPLED_STEPS:
        parser.error(f"--sampled-steps must be at least {MIN_SAMPLED_STEPS}")
    return options


def _show(found: Sequence[Figures], suffix: str, options: argparse.Namespace) -> int:
    reference, ours = found
    difference = abs(ours.first_loss / reference.first_loss - 1)
    rows = [
        {
            "side": one.side,
            "steps": one.steps,
            "measured_steps": one.measured_steps,
            "step_seconds": one.step_seconds,
            "seconds": one.seconds,
            "cpu_seconds": one.cpu_seconds,
            "peak_gb": one.peak_gb,
            "first_loss": one.first_loss,
            "time_ratio": reference.seconds / one.seconds,
            "differs_by": difference if one is ours else None,
        }
        for one in found
    ]
    extrapolated = ""
    if reference.measured_steps < reference.steps:
        extrapolated = f"; the reference's seconds are extrapolated from {reference.measured_steps} steps"
    title = (
        f"A whole run of 4 stages: {options.num_rows} rows, {options.epochs} epochs a stage, batches of "
        f"{options.batch_size}, {reference.steps} steps{extrapolated}"
    )
    results.print_about(f"whole_run{suffix}", title)
    for row in rows:
        results.print_row(f"whole_run{suffix}", **row)
    shown = [{name: value for name, value in row.items() if name not in JSON_ONLY} for row in rows]
    tables.results_table(title, [results.heading(name) for name in shown[0]], [[*row.values()] for row in shown])
    if reference.steps == ours.steps and difference <= TOLERANCE:
        return 0
    print(f"the losses of step 1 differ by {difference:.3g}, above {TOLERANCE:g}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    entry.run(main)
