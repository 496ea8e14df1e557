"""How the seconds and the memory of one optimizer step grow: with the vocabulary, the responses' length, and the rows.

    python benchmarks/scaling.py                     a small made-up Llama, random rows: no data needed
    python benchmarks/scaling.py --model FOLDER      a real model; its vocabulary is what it is

One of the three varies, the others stay at 16,384 tokens, rows like Dolly's, and 8 rows. A step of the reference that
would need more memory than `--memory-gb` is left out, and so are steps of every side once one took `--step-seconds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import entry
import measuring
import results
from cases import DOLLY_LENGTHS, PADDED_LENGTH, TINY, Setup, add_setup_options, setup_of
from measuring import Job, Measurement
from pocl_cli import tables

AXES: dict[str, tuple[int, ...]] = {
    "vocabulary": (8_192, 16_384, 32_768, 65_536, 131_072, 151_936),
    "response_length": (32, 64, 128, 256, 512, 1024),
    "rows": (1, 2, 4, 8, 16, 32, 64),
}
SIDES = ("reference", "online", "stored")
NUM_ROWS, PROMPT_LENGTH = 8, 64
LLAMA: dict[str, Any] = {
    **TINY,
    "vocab_size": 16_384,
    "hidden_size": 128,
    "intermediate_size": 384,
    "initializer_range": 0.1,
}
# The reference's peak in [B, L, V] float32 tensors. About 9.5 were measured with forward KL; the rest is for libraries
# and models.
REFERENCE_TENSORS = 12


@dataclasses.dataclass(frozen=True)
class Point:
    """One place on one axis."""

    axis: str
    value: int
    setup: Setup

    @property
    def reference_gb(self) -> float:
        """What the reference's logits and their like need, in 10⁹ bytes."""
        longest = max(PADDED_LENGTH, *(sum(lengths) for lengths in self.setup.lengths))
        vocabulary = _vocabulary(self.setup)
        return REFERENCE_TENSORS * 4 * len(self.setup.lengths) * longest * vocabulary / 1e9


def points(setup: Setup, axis: str, num_points: int | None = None) -> Iterator[Point]:
    """The places to measure on an axis, the first `num_points` of them; none where a real model fixes the value."""
    if axis == "vocabulary" and setup.model is not None:
        return
    for value in AXES[axis][:num_points]:
        yield Point(axis, value, _at(setup, axis, value))


def main(arguments: Sequence[str]) -> int:
    """Measures every place on the axes and draws one table an axis. Returns the exit code."""
    parser = argparse.ArgumentParser(description="How an optimizer step's seconds and memory grow.")
    add_setup_options(parser, rows=False)
    parser.add_argument("--axes", nargs="+", choices=tuple(AXES), default=tuple(AXES), help="default: all")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all")
    parser.add_argument("--points", type=int, metavar="N", help="the first N values of every axis; default: all")
    limit = "leave out the reference where it needs more, in 10⁹ bytes (8)"
    parser.add_argument("--memory-gb", type=float, default=8.0, metavar="GB", help=limit)
    slow = "leave out a side's larger values on an axis once a step of it took longer (60)"
    parser.add_argument("--step-seconds", type=float, default=60.0, metavar="S", help=slow)
    options = parser.parse_args(arguments)
    setup = setup_of(parser, options)
    for axis in options.axes:
        rows = _measure_axis(axis, setup, options)
        if rows:
            title = f"One optimizer step under forward KL by {axis.replace('_', ' ')}; medians of {options.repeats}"
            tables.results_table(title, [results.heading(name) for name in rows[0]], [[*row.values()] for row in rows])
    return 0


def _measure_axis(axis: str, setup: Setup, options: argparse.Namespace) -> list[dict[str, object]]:
    table = f"scaling_{axis}{setup.name}"
    rows: list[dict[str, object]] = []
    slow: dict[str, int] = {}
    for point in points(setup, axis, options.points):
        with measuring.filled_store(point.setup, needed="stored" in options.sides and "stored" not in slow) as store:
            for side in options.sides:
                reason = _reason_to_skip(point, side, slow, options)
                measured = None
                if reason is None:
                    measured = _measured(point, side, options.repeats, store)
                    if measured.seconds > options.step_seconds:
                        slow[side] = point.value
                if not rows:
                    results.print_about(table, _title(axis, setup, options))
                rows.append(_row(point, side, measured, reason))
                results.print_row(table, **rows[-1])
    return rows


def _reason_to_skip(point: Point, side: str, slow: dict[str, int], options: argparse.Namespace) -> str | None:
    if side in slow:
        return f"a step at {slow[side]:,} took more than {options.step_seconds:g} s"
    if side == "reference" and point.reference_gb > options.memory_gb:
        return f"needs about {point.reference_gb:.0f} GB"
    return None


def _measured(point: Point, side: str, repeats: int, store: Path | None) -> Measurement:
    what = f"{point.axis} {point.value}, {side}"
    return measuring.in_fresh_process(what, measuring.measure, Job(point.setup, side, repeats=repeats, store=store))


def _row(point: Point, side: str, measured: Measurement | None, reason: str | None) -> dict[str, object]:
    return {
        point.axis: point.value,
        "side": side,
        "seconds": measured and measured.seconds,
        "peak_gb": measured and measured.peak_gb,
        "left_out": reason,
    }


def _title(axis: str, setup: Setup, options: argparse.Namespace) -> str:
    model = setup.model.name if setup.model else "a made-up Llama"
    return f"One optimizer step of {model} under forward KL, by {axis.replace('_', ' ')}; medians of {options.repeats}"


def _at(setup: Setup, axis: str, value: int) -> Setup:
    """`setup` with one axis at `value`: 8 rows of Dolly's lengths, or all of one length where that is the axis."""
    cycle = [DOLLY_LENGTHS[i % len(DOLLY_LENGTHS)] for i in range(value if axis == "rows" else NUM_ROWS)]
    lengths = [(PROMPT_LENGTH, value)] * NUM_ROWS if axis == "response_length" else cycle
    vocabulary = value if axis == "vocabulary" else LLAMA["vocab_size"]
    return dataclasses.replace(setup, lengths=tuple(lengths), architecture={**LLAMA, "vocab_size": vocabulary})


def _vocabulary(setup: Setup) -> int:
    if setup.model is None:
        return int(setup.architecture["vocab_size"])
    from pocl_cli.models.folder import check_model_folder

    check_model_folder(setup.model)
    return int(json.loads((setup.model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


if __name__ == "__main__":
    entry.run(main)
