"""What stands between an optimizer step of ours and the machine's rate of matrix products.

    python benchmarks/roofline.py                                 a small model made here
    python benchmarks/roofline.py --model FOLDER --rows FILE      a real one

The roofline is the time that the step's necessary multiply-adds (`arithmetic.py`) take at the best rate which this
machine reaches, with the same number of threads, on float32 products of the step's shapes. Three tables: the rates, the
step beside its roofline, and where a step's time goes (torch's profiler, a step of its own).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import arithmetic
import entry
import measuring
import results
from cases import METHODS, Case, Setup, add_setup_options, setup_of, shipped
from measuring import Job
from pocl_cli import tables

if TYPE_CHECKING:
    from torch import Tensor

SIDES = ("online", "stored")
# A product is repeated until it has taken so long, and at least so often.
RATE_SECONDS, RATE_REPEATS = 1.0, 5
# Beginnings of operators' names, without `aten::`; the first group that fits has the operator. What fits none is other.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear"),
    "attention": ("_scaled_dot_product", "_flash_attention"),
    "optimizer": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "softmax": ("_log_softmax", "_softmax", "logsumexp", "exp", "log", "logaddexp"),
    "copies": (
        "copy_", "clone", "cat", "zero", "fill", "empty", "index", "gather", "scatter", "_to_copy", "embedding",
    ),
    "elementwise": (
        "mul", "add", "sub", "div", "neg", "sum", "amax", "max", "mean", "pow", "rsqrt", "silu", "gelu", "abs", "where",
        "masked", "xlogy", "ge", "eq", "ne", "sgn", "cos", "sin", "tanh", "native_layer_norm",
    ),
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Measures rates, steps and shares, and draws the three tables. Returns the exit code."""
    parser = argparse.ArgumentParser(description="An optimizer step beside the machine's rate of matrix products.")
    add_setup_options(parser)
    parser.add_argument("--method", choices=METHODS, default="fkl", help="the divergence (fkl)")
    options = parser.parse_args(arguments)
    setup = setup_of(parser, options)
    rounds, measured, needed, shares = [], [], [], []
    with measuring.filled_store(setup) as store:
        for side in SIDES:
            # Before each side and after the last: what else the machine does changes from minute to minute.
            rounds.append(measuring.in_fresh_process("the rates", matrix_rates, setup))
            job = Job(setup, side, options.method, repeats=options.repeats, store=store)
            measured.append(measuring.in_fresh_process(side, measuring.measure, job))
            needed.append(measuring.in_fresh_process(f"counting {side}", count, job) / 1e9)
            shares.append({"side": side, **measuring.in_fresh_process(f"profiling {side}", profile, job)})
        rounds.append(measuring.in_fresh_process("the rates", matrix_rates, setup))
    rates = {product: max(one[product] for one in rounds) for product in rounds[0]}
    steps = [
        beside_the_roofline(side, gmac, one.seconds, max(rates.values()))
        for side, gmac, one in zip(SIDES, needed, measured, strict=True)
    ]
    products = [{"product": product, "gmac_per_s": rate} for product, rate in rates.items()]
    for table, title, rows in (
        ("roofline_rates", "Float32 matrix products: 10⁹ multiply-adds a second, best of several", products),
        ("roofline", f"One optimizer step ({options.method}) beside its roofline", steps),
        ("roofline_shares", "Seconds of one profiled step by kind of operator", shares),
    ):
        _table(f"{table}{setup.name}", title, rows, measured[0].num_threads)
    return 0


def beside_the_roofline(side: str, gmac: float, seconds: float, rate: float) -> dict[str, object]:
    """A row of the table; `rate` in 10⁹ multiply-adds a second. Warns of a step that is faster than it can be."""
    ratio = seconds * rate / gmac
    if ratio < 1:
        why = "the rate was measured on a busier machine than the step: measure again"
        print(f"{side}: {ratio:.3g} of its roofline is impossible; {why}", file=sys.stderr)
    return {
        "side": side,
        "gmac": gmac,
        "roofline_seconds": gmac / rate,
        "seconds": seconds,
        "times_the_roofline": ratio,
    }


def count(job: Job) -> int:
    """The multiply-adds that one optimizer step of `job` must do."""
    from pocl_cli.models.head import split_model

    case = Case(job.setup)
    student, teacher = (
        arithmetic.forward(split_model(model), case.rows, case.num_real_tokens)
        for model in (case.student.model, case.load_teacher().model)
    )
    return arithmetic.optimizer_step(student, teacher, job.side)


def matrix_rates(setup: Setup) -> dict[str, float]:
    """10⁹ multiply-adds a second of float32 products as the step makes them: of a layer, and of the head both ways."""
    import torch

    from pocl_cli.models.head import split_model
    from pocl_cli.schema import HardwareConfig
    from pocl_cli.training.objective import tokens_per_chunk

    case = Case(setup)
    headed = split_model(case.student.model)
    width, vocabulary = headed.hidden_size, case.num_real_tokens
    hardware = HardwareConfig(**shipped("hardware/cpu"))
    room = tokens_per_chunk(headed.num_logits, hardware.objective_memory_mb, torch.device("cpu"))
    chunk = min(room, case.num_response_tokens)
    tokens = sum(row.num_tokens for row in case.rows)
    shapes = {
        "layer [T, D] × [D, 4D]": (tokens, width, 4 * width),
        "head [n, D] × [D, V]": (chunk, width, vocabulary),
        "its hidden gradient [n, V] × [V, D]": (chunk, vocabulary, width),
        "its weight gradient [V, n] × [n, D]": (vocabulary, chunk, width),
    }
    return {
        f"{name}, {rows} × {inner} × {columns}": _rate(torch.randn(rows, inner), torch.randn(columns, inner).T)
        for name, (rows, inner, columns) in shapes.items()
    }


def _rate(left: Tensor, right: Tensor) -> float:
    """The best rate of several products, the first of which does not count."""
    import torch

    out = left @ right
    seconds: list[float] = []
    while len(seconds) < RATE_REPEATS or sum(seconds) < RATE_SECONDS:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return left.shape[0] * left.shape[1] * right.shape[1] / min(seconds) / 1e9


def profile(job: Job) -> dict[str, float]:
    """Seconds of one optimizer step by group of operators; `outside` is the time in no operator, mostly Python.

    Profiling itself takes time: compare the shares, not the sum.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    step = measuring.optimizer_step(Case(job.setup, method=job.method, store=job.store), job.side)
    step()
    with profiled(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        step()
        wall = time.perf_counter() - started
    shares = dict.fromkeys((*GROUPS, "other"), 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            shares[group_of(event.key)] += event.self_cpu_time_total / 1e6
    return {**shares, "outside": max(0.0, wall - sum(shares.values()))}


def group_of(operator: str) -> str:
    """The group that an operator's time is counted in."""
    name = operator.removeprefix("aten::")
    return next((group for group, beginnings in GROUPS.items() if name.startswith(beginnings)), "other")


def _table(name: str, title: str, rows: Sequence[Mapping[str, object]], num_threads: int) -> None:
    results.print_about(name, title, num_threads=num_threads)
    for row in rows:
        results.print_row(name, **row)
    tables.results_table(title, [results.heading(column) for column in rows[0]], [[*row.values()] for row in rows])


if __name__ == "__main__":
    entry.run(main)
