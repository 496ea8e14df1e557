"""What checkpoints cost: the seconds to write one and to read it back, beside those of the steps between two.

    python benchmarks/checkpoint.py                                 a small model made here
    python benchmarks/checkpoint.py --model FOLDER --rows FILE      a real one

A checkpoint holds model and optimizer, every file flushed to the disk and hashed; reading it back hashes it again,
which a resumed run does once. `share` is the writing at the shipped `train.checkpoint_every`, against the stored
teacher's step, the fastest there is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import entry
import measuring
import results
from cases import METHODS, Case, add_setup_options, setup_of, shipped
from measuring import Job
from pocl_cli import tables


def main(arguments: Sequence[str]) -> int:
    """Measures steps and checkpoints and draws the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description="The cost of a checkpoint beside that of the steps between two.")
    add_setup_options(parser)
    parser.add_argument("--method", choices=METHODS, default="fkl", help="the divergence (fkl)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the system's temporary folder)")
    options = parser.parse_args(arguments)
    setup = setup_of(parser, options)
    with measuring.filled_store(setup) as store:
        job = Job(setup, "stored", options.method, repeats=options.repeats, store=store)
        step = measuring.in_fresh_process("a step", measuring.measure, job)
        wrote, read, num_bytes = measuring.in_fresh_process("checkpoints", write_and_read, job, options.folder)
    every = int(shipped("base")["train"]["checkpoint_every"])
    row = {
        "gb": num_bytes / 1e9,
        "step_seconds": step.seconds,
        "write_seconds": wrote,
        "read_seconds": read,
        "checkpoint_every": every,
        "share": wrote / (every * step.seconds),
    }
    name, title = f"checkpoint{setup.name}", "A checkpoint of model and optimizer, and its share of the training time"
    results.print_about(name, title, num_threads=step.num_threads)
    results.print_row(name, **row)
    tables.results_table(title, [results.heading(column) for column in row], [[*row.values()]])
    return 0


def write_and_read(job: Job, folder: Path | None) -> tuple[float, float, int]:
    """Median seconds of writing a checkpoint and of reading it back, and its bytes."""
    from pocl_cli.training import checkpoint
    from pocl_cli.training.optimizer import make_optimizer
    from pocl_cli.training.state import TrainingState

    case = Case(job.setup, method=job.method, store=job.store)
    model = case.student.model
    optimizer = make_optimizer(model, lr=measuring.LR, weight_decay=measuring.WEIGHT_DECAY)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wrote, read, state = [], [], TrainingState()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for _ in range(job.repeats):
            state = replace(state, step=state.step + 1)
            started = time.perf_counter()
            checkpoint.save(Path(place), state, model, optimizer)
            wrote.append(time.perf_counter() - started)
            started = time.perf_counter()
            found = checkpoint.load_newest(Path(place), model)
            read.append(time.perf_counter() - started)
            assert found is not None, "the checkpoint is there"
        num_bytes = sum(path.stat().st_size for path in found[1].iterdir())
    return statistics.median(wrote), statistics.median(read), num_bytes


if __name__ == "__main__":
    entry.run(main)
