"""Seconds and memory of one optimizer step beside TRL's and Liger's losses, on the divergences that all of them have.

    python benchmarks/libraries.py                                             a small model made here
    python benchmarks/libraries.py --model FOLDER --rows FILE --methods fkl    a real one

At kd_ratio 1, because TRL's loss has no cross entropy: the loss is T² times the divergence per response token. TRL and
Liger are measured where the extra `bench` is installed. Output and exit code are those of `optimizer_step.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import entry
from cases import add_setup_options, setup_of
from comparing import Comparison, available_sides, compare
from sides import BETAS, SIDES

KD_RATIO = 1.0


def main(arguments: Sequence[str]) -> int:
    """Measures the sides for every method and draws the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description="One optimizer step beside other libraries.")
    add_setup_options(parser)
    parser.add_argument("--methods", nargs="+", choices=tuple(BETAS), default=tuple(BETAS), help="default: all")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), help="default: all whose packages are installed")
    compiles = "Liger without torch.compile; by default it compiles where there is a C++ compiler"
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help=compiles)
    options = parser.parse_args(arguments)
    setup = setup_of(parser, options)
    sides = available_sides(options.sides, tuple(SIDES), parser)
    title = f"One optimizer step at kd_ratio {KD_RATIO:g}"
    table = f"libraries{setup.name}"
    return compare(Comparison(table, title, setup, options.methods, sides, KD_RATIO, options.repeats))


if __name__ == "__main__":
    entry.run(main)
