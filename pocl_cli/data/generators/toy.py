"""The embedded instruction set: made from a seed, without a download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pocl_cli.data.generators.toy_tasks import FAMILIES, LEVELS, Draws, Question
from pocl_cli.errors import ConfigError, nearest
from pocl_cli.registry import generators

SPLITS = ("train", "test")
# One question in so many goes to the test split.
TEST_SHARE = 5
# So many draws in a row without a new row mean that a family has (almost) no more of them at that level.
PATIENCE = 1000


@generators.register("toy")
@dataclass(frozen=True)
class ToyInstructions:
    """Twelve task families at three levels of difficulty, in equal parts; `category` is "family/level".

    The split of a row is a function of its question (family, input, answer and the values named in the instruction,
    not its wording), so no train row, whatever the seed and the number of rows, is a test row or one in other words.
    All rows of a split are different, and the first n of them do not depend on how many are asked for.
    """

    version: ClassVar[int] = 1

    def rows(self, split: str, num_rows: int, seed: int) -> list[dict[str, str]]:
        """`num_rows` rows with the keys `instruction`, `input`, `output`, `category`.

        Raises:
            ConfigError: the split is neither "train" nor "test", or a family has not so many different rows.
        """
        if split not in SPLITS:
            guess = nearest(split, SPLITS)
            raise ConfigError(
                f"unknown split {split!r}",
                where="dataset.split",
                why=f"the toy data set has {' and '.join(SPLITS)}",
                fix=f"did you mean {guess!r}?" if guess else "set dataset.split to one of them",
            )
        stream = _stream(split, seed)
        return [next(stream) for _ in range(num_rows)]


def split_of(family: str, question: Question) -> str:
    """The split that a question belongs to, from a hash of its content."""
    content = json.dumps([family, question.input, question.output, question.slots], sort_keys=True)
    digest = hashlib.sha256(content.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def _stream(split: str, seed: int) -> Iterator[dict[str, str]]:
    """Different rows of a split without end: every run of 36 holds each family at each level once, in random order."""
    draws = Draws(f"toy {ToyInstructions.version} {split} {seed}")
    cells = [(family, level) for family in FAMILIES for level in range(len(LEVELS))]
    seen: set[tuple[str, str]] = set()
    count = 0
    while True:
        for family, level in draws.sample(cells, len(cells)):
            row = _new_row(draws, split, family, level, seen)
            if row is None:
                raise ConfigError(
                    f"the toy data set has no more than about {count} different rows in its split {split}",
                    where="dataset.num_rows",
                    why=f"its tasks {family}/{LEVELS[level]} are used up",
                    fix=f"set dataset.num_rows to at most {count}",
                )
            seen.add((row["instruction"], row["input"]))
            count += 1
            yield row


def _new_row(draws: Draws, split: str, family: str, level: int, seen: set[tuple[str, str]]) -> dict[str, str] | None:
    """A row of the split that is not in `seen`, or None where none was found."""
    for _ in range(PATIENCE):
        question = FAMILIES[family](draws, level)
        if split_of(family, question) != split:
            continue
        instruction = draws.choice(question.wordings).format(**question.slots)
        if (instruction, question.input) in seen:
            continue
        category = f"{family}/{LEVELS[level]}"
        return {"instruction": instruction, "input": question.input, "output": question.output, "category": category}
    return None
