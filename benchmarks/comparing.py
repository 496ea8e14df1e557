"""Sides side by side: measures each in a fresh process, prints a line a measurement, then the table, and compares."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import measuring
import results
from cases import Setup
from measuring import Job, Measurement
from pocl_cli import tables
from sides import PACKAGES, missing_package

TOLERANCE = 1e-4
# Columns that a terminal has no room for.
JSON_ONLY = ("loss", "gradient_norm")


@dataclass(frozen=True)
class Comparison:
    """What is compared with what. `sides` and `methods` are in the order of the table."""

    table: str
    title: str
    setup: Setup
    methods: Sequence[str]
    sides: Sequence[str]
    kd_ratio: float
    repeats: int


@dataclass(frozen=True)
class Line:
    """One line of the table. The ratios are the reference's figure divided by this side's; None without a reference.

    Attributes:
        differs_by: the relative difference from the method's first side; None for that one.
    """

    method: str
    side: str
    measurement: Measurement
    time_ratio: float | None
    gb_ratio: float | None
    differs_by: float | None

    def columns(self) -> dict[str, object]:
        """The line as JSON holds it and the table shows it."""
        one = self.measurement
        return {
            "method": self.method,
            "side": self.side,
            "seconds": one.seconds,
            "cpu_seconds": one.cpu_seconds,
            "peak_gb": one.peak_gb,
            "loss": one.loss,
            "gradient_norm": one.gradient_norm,
            "time_ratio": self.time_ratio,
            "gb_ratio": self.gb_ratio,
            "differs_by": self.differs_by,
        }


def available_sides(asked: Sequence[str] | None, default: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The sides to measure: those asked for, or the default ones whose packages are installed.

    A side asked for by name without its package ends the program with exit code 2; of the default ones such a side is
    left out, and a line on standard error says so.
    """
    for side in asked or ():
        if package := missing_package(side):
            parser.error(f"--sides {side} needs the package {package}: pip install 'pocl-cli[bench]'")
    found = []
    for side in asked or default:
        if package := missing_package(side):
            print(f"side {side} is left out: the package {package} is not installed (extra: bench)", file=sys.stderr)
        else:
            found.append(side)
    return found


def compare(comparison: Comparison) -> int:
    """Measures, prints and draws. Returns 1 where two sides differ about the loss or the gradient norm, else 0."""
    lines: list[Line] = []
    with measuring.filled_store(comparison.setup, needed="stored" in comparison.sides) as store:
        for method in comparison.methods:
            of_method: list[Line] = []
            for side in comparison.sides:
                job = Job(comparison.setup, side, method, comparison.kd_ratio, comparison.repeats, store)
                measured = measuring.in_fresh_process(f"{method}, {side}", measuring.measure, job)
                of_method.append(line_of(method, side, measured, of_method))
                if not lines and len(of_method) == 1:
                    _print_about(comparison, measured)
                results.print_row(comparison.table, **of_method[-1].columns())
            lines += of_method
    shown = [{name: value for name, value in line.columns().items() if name not in JSON_ONLY} for line in lines]
    headings = [results.heading(name) for name in shown[0]]
    tables.results_table(_title(comparison, lines[0].measurement), headings, [[*one.values()] for one in shown])
    return exit_code(lines)


def difference(one: Measurement, other: Measurement) -> float:
    """The larger of the relative differences of loss and gradient norm; NaN where one of them is."""
    ratios = (other.loss / one.loss, other.gradient_norm / one.gradient_norm)
    return max((abs(ratio - 1) for ratio in ratios), key=lambda ratio: (math.isnan(ratio), ratio))


def line_of(method: str, side: str, measured: Measurement, before: Sequence[Line]) -> Line:
    """The line of a side, measured after the lines `before` it of the same method."""
    reference = next((line.measurement for line in before if line.side == "reference"), None)
    return Line(
        method,
        side,
        measured,
        time_ratio=reference.seconds / measured.seconds if reference else None,
        gb_ratio=reference.peak_gb / measured.peak_gb if reference else None,
        differs_by=difference(before[0].measurement, measured) if before else None,
    )


def exit_code(lines: Iterable[Line]) -> int:
    """1 where a side differs by more than `TOLERANCE`, and a line on standard error names it; else 0."""
    wrong = [line for line in lines if line.differs_by is not None and not line.differs_by <= TOLERANCE]
    for line in wrong:
        print(f"{line.method}: {line.side} differs by {line.differs_by:.3g}, above {TOLERANCE:g}", file=sys.stderr)
    return 1 if wrong else 0


def _title(comparison: Comparison, measured: Measurement) -> str:
    return (
        f"{comparison.title}: {measured.num_rows} rows, {measured.num_tokens} tokens, {measured.num_response_tokens} "
        f"of them of responses; medians of {comparison.repeats}; ratio = reference / this side"
    )


def _print_about(comparison: Comparison, measured: Measurement) -> None:
    packages = [PACKAGES[side].replace("_", "-") for side in comparison.sides if side in PACKAGES]
    results.print_about(
        comparison.table,
        _title(comparison, measured),
        num_threads=measured.num_threads,
        packages=packages,
    )
