"""Holds rows out of training, for evaluation between the epochs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from pocl_cli.errors import DataError
from pocl_cli.records import Record


def split_dev(records: Sequence[Record], dev_size: int, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The training rows and the dev rows, each in the order of `records`.

    Which rows are held out depends on their content and the seed only, not on their order. Copies of a row stay
    together; the dev rows are fewer than `dev_size` only where they would have to part.

    Raises:
        DataError: no training row would be left, or no dev row can be held out.
    """
    if dev_size == 0:
        return tuple(records), ()
    if dev_size >= len(records):
        raise DataError(
            f"{dev_size} dev rows are asked for and {len(records)} rows are usable",
            where="dataset.dev_size",
            why="no row would be left to train on",
            fix=f"set dataset.dev_size to a smaller number ({max(1, len(records) // 10)} is a tenth; 0 turns it off)",
        )
    copies: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        copies[record.id.partition("-")[0]].append(record.id)
    held_out: set[str] = set()
    for content in sorted(copies, key=lambda content: (_rank(seed, content), content)):
        if len(held_out) + len(copies[content]) <= dev_size:
            held_out.update(copies[content])
    if not held_out:
        raise DataError(
            f"no {dev_size} dev rows can be held out",
            where="dataset.dev_size",
            why="every row has more copies than that, and copies stay on one side",
            fix="set dataset.dev_size to a larger number, or to 0 to turn it off",
        )
    return (
        tuple(record for record in records if record.id not in held_out),
        tuple(record for record in records if record.id in held_out),
    )


def _rank(seed: int, content: str) -> str:
    return hashlib.sha256(f"dev {seed} {content}".encode()).hexdigest()
