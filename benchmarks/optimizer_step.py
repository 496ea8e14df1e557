"""Seconds and memory of one optimizer step under each of the six divergences: the reference's formulation and ours.

    python benchmarks/optimizer_step.py                                             a small model made here
    python benchmarks/optimizer_step.py --model FOLDER --rows FILE --methods fkl    a real one

Standard output has one JSON line a measurement; the table comes last, on standard error. Exit code 1: the sides
disagree about the loss or the gradient norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import entry
from cases import KD_RATIO, METHODS, add_setup_options, setup_of
from comparing import Comparison, compare

SIDES = ("reference", "online", "stored")


def main(arguments: Sequence[str]) -> int:
    """Measures the sides for every method and draws the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description="One optimizer step, the reference's way and ours.")
    add_setup_options(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all of them")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all of them")
    options = parser.parse_args(arguments)
    setup = setup_of(parser, options)
    title = f"One optimizer step at kd_ratio {KD_RATIO}"
    table = f"optimizer_step{setup.name}"
    return compare(Comparison(table, title, setup, options.methods, options.sides, KD_RATIO, options.repeats))


if __name__ == "__main__":
    entry.run(main)
