"""The toy instruction set's 12 task families, each at three levels of difficulty.

ROUGE lower-cases and splits at punctuation, so no task turns on case or punctuation. The tasks' words are whole tokens
of `pocl_cli.models.toy_tokenizer`: a new word here needs an entry there, and a test compares the two.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

LEVELS = ("easy", "medium", "hard")
CLASSES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "cow", "dog", "fox", "hen", "owl", "pig", "rat"),
    "fruit": ("apple", "fig", "grape", "kiwi", "lemon", "mango", "peach", "plum"),
    "tool": ("axe", "brush", "drill", "hammer", "knife", "rake", "saw", "wrench"),
    "colour": ("black", "blue", "brown", "green", "pink", "red", "white", "yellow"),
}
WORDS: tuple[str, ...] = tuple(word for words in CLASSES.values() for word in words)
DIGITS: tuple[str, ...] = tuple("0123456789")
ORDINALS = ("first", "second", "third", "fourth")


class Draws:
    """Random draws that are the same in every Python version.

    Only `Random.random()` is promised to keep its sequence; `choice`, `sample` and `shuffle` are not.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")).random

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        return int(self._random() * bound)

    def choice(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """`count` different positions of `values`, in random order."""
        pool = list(values)
        for place in range(count):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]


@dataclass(frozen=True, slots=True)
class Question:
    """One task with its answer. `wordings` are instructions that all ask it; `slots` fill their `{placeholders}`."""

    wordings: tuple[str, ...]
    input: str
    output: str
    slots: dict[str, str] = field(default_factory=dict)


Asker = Callable[[Draws, int], Question]  # the int is the level: 0 easy, 1 medium, 2 hard
FAMILIES: dict[str, Asker] = {}


def _family(name: str) -> Callable[[Asker], Asker]:
    def add(ask: Asker) -> Asker:
        FAMILIES[name] = ask
        return ask

    return add


@_family("copy")
def _copy(draws: Draws, level: int) -> Question:
    """The list itself: two or three words, then three, then four."""
    words = " ".join(draws.sample(WORDS, 2 + draws.below(2) if level == 0 else level + 2))
    return Question(("Copy the list.", "Repeat the words.", "Write the list again."), words, words)


@_family("reverse")
def _reverse(draws: Draws, level: int) -> Question:
    """The list from its end: two or three words, then three, then four."""
    words = draws.sample(WORDS, 2 + draws.below(2) if level == 0 else level + 2)
    wordings = ("Reverse the list.", "Write the words from last to first.", "Turn the list around.")
    return Question(wordings, " ".join(words), " ".join(reversed(words)))


@_family("sort")
def _sort(draws: Draws, level: int) -> Question:
    """Three digits, then four digits, then three words."""
    if level == 2:
        words = draws.sample(WORDS, 3)
        wordings = ("Sort the words by alphabet.", "Write the words in alphabetical order.")
        return Question(wordings, " ".join(words), " ".join(sorted(words)))
    digits = [draws.choice(DIGITS) for _ in range(level + 3)]
    if draws.below(2):
        up = ("Sort the numbers up.", "Write the numbers from smallest to largest.", "Order the numbers up.")
        return Question(up, " ".join(digits), " ".join(sorted(digits)))
    down = ("Sort the numbers down.", "Write the numbers from largest to smallest.", "Order the numbers down.")
    return Question(down, " ".join(digits), " ".join(sorted(digits, reverse=True)))


@_family("deduplicate")
def _deduplicate(draws: Draws, level: int) -> Question:
    """One repeat in three words, then one in four, then two in five."""
    words = draws.sample(WORDS, 3 if level else 2)
    items = draws.sample(words + draws.sample(words, 2 if level == 2 else 1), len(words) + (2 if level == 2 else 1))
    wordings = ("Remove repeated words.", "Keep every word once.", "Write each word only once.")
    return Question(wordings, " ".join(items), " ".join(dict.fromkeys(items)))


@_family("replace")
def _replace(draws: Draws, level: int) -> Question:
    """One word of two, then of three, then twice in a list of four."""
    *words, new = draws.sample(WORDS, (3, 4, 4)[level])
    old = draws.choice(words)
    items = draws.sample([*words, old], 4) if level == 2 else words
    wordings = ("Replace {old} with {new}.", "Change {old} to {new}.", "Turn {old} into {new}.")
    answer = " ".join(new if item == old else item for item in items)
    return Question(wordings, " ".join(items), answer, {"old": old, "new": new})


@_family("extract")
def _extract(draws: Draws, level: int) -> Question:
    """One field of two, then of three, then two fields of three."""
    values = {name: draws.choice(words) for name, words in CLASSES.items()}
    values |= {name: draws.choice(DIGITS) for name in ("size", "age")}
    names = draws.sample(tuple(values), 2 if level == 0 else 3)
    record = ", ".join(f"{name} {values[name]}" for name in names)
    one, two = draws.sample(names, 2)
    if level == 2:
        wordings = ("Give the {one} and the {two}.", "Extract {one} and {two}.")
        return Question(wordings, record, f"{values[one]} {values[two]}", {"one": one, "two": two})
    return Question(("Give the {one}.", "Extract the {one}.", "What is the {one}?"), record, values[one], {"one": one})


@_family("lookup")
def _lookup(draws: Draws, level: int) -> Question:
    """A value from a table of two rows, then of three, then from one of two columns of two rows."""
    names = draws.sample(WORDS, 3 if level == 1 else 2)
    columns = {
        "size": [draws.choice(DIGITS) for _ in names],
        "colour": [draws.choice(CLASSES["colour"]) for _ in names],
    }
    row, column = draws.below(len(names)), draws.choice(tuple(columns))
    shown = columns if level == 2 else {column: columns[column]}
    table = "\n".join(" ".join([name, *(values[line] for values in shown.values())]) for line, name in enumerate(names))
    wordings = ("Find the {column} of {name}.", "Look up the {column} of {name}.", "Which {column} has {name}?")
    return Question(wordings, table, columns[column][row], {"column": column, "name": names[row]})


@_family("classify")
def _classify(draws: Draws, level: int) -> Question:
    """Is a number large; is a word of a class; is a word in the list. The answers to give are part of the rule."""
    yes, no = draws.sample(WORDS, 2)
    if level == 0:
        number, limit = draws.sample(range(10), 2)
        wordings = (
            "Say {yes} if it is above {limit}, else {no}.",
            "Write {yes} if it is more than {limit}, else {no}.",
        )
        return Question(
            wordings, str(number), yes if number > limit else no, {"yes": yes, "no": no, "limit": str(limit)}
        )
    if level == 1:
        kind = draws.choice(tuple(CLASSES))
        words = CLASSES[kind] if draws.below(2) else [word for word in WORDS if word not in CLASSES[kind]]
        word = draws.choice(words)
        wordings = ("Say {yes} if it is of class {kind}, else {no}.", "Write {yes} if the class is {kind}, else {no}.")
        return Question(wordings, word, yes if word in CLASSES[kind] else no, {"yes": yes, "no": no, "kind": kind})
    items = draws.sample(WORDS, 3)
    seen = draws.choice(items if draws.below(2) else [word for word in WORDS if word not in items])
    wordings = ("Say {yes} if the list has {seen}, else {no}.", "Write {yes} if there is {seen}, else {no}.")
    return Question(wordings, " ".join(items), yes if seen in items else no, {"yes": yes, "no": no, "seen": seen})


@_family("add")
def _add(draws: Draws, level: int) -> Question:
    """Digits with a sum below ten, then any two digits, then a digit and a number of two digits."""
    thing = draws.choice(WORDS)
    one = draws.below(10)
    two = draws.below(10 - one) if level == 0 else draws.below(10) if level == 1 else 10 + draws.below(20)
    slots = {"thing": thing, "one": str(one), "two": str(two)}
    wordings = (
        "Add {one} {thing} and {two} {thing}.",
        "How many are {one} {thing} and {two} {thing}?",
        "What is {one} {thing} more than {two} {thing}?",
        "Give the sum of {one} {thing} and {two} {thing}.",
    )
    return Question(wordings, "", f"{one + two} {thing}", slots)


@_family("count")
def _count(draws: Draws, level: int) -> Question:
    """All words of the list, then how often one word stands there, then the words of one class."""
    if level == 0:
        items = draws.sample(WORDS, 1 + draws.below(4))
        wordings = ("Count the words.", "How many words are in the list?")
        return Question(wordings, " ".join(items), str(len(items)))
    if level == 1:
        word, other = draws.sample(WORDS, 2)
        items = [draws.choice((word, word, other)) for _ in range(4)]
        wordings = ("Count the word {word}.", "How many times comes {word}?")
        return Question(wordings, " ".join(items), str(items.count(word)), {"word": word})
    items = draws.sample(WORDS, 4)
    kind = draws.choice(tuple(CLASSES))
    wordings = ("Count the words of class {kind}.", "How many words are of class {kind}?")
    return Question(wordings, " ".join(items), str(sum(item in CLASSES[kind] for item in items)), {"kind": kind})


@_family("extreme")
def _extreme(draws: Draws, level: int) -> Question:
    """Smallest or largest of three digits, then of four, then of two numbers of two digits."""
    low, high, count = ((0, 10, 3), (0, 10, 4), (10, 100, 2))[level]
    numbers = [low + draws.below(high - low) for _ in range(count)]
    text = " ".join(map(str, numbers))
    if draws.below(2):
        return Question(
            ("Give the smallest number.", "Find the minimum.", "What is the lowest?"), text, str(min(numbers))
        )
    return Question(("Give the largest number.", "Find the maximum.", "What is the highest?"), text, str(max(numbers)))


@_family("position")
def _position(draws: Draws, level: int) -> Question:
    """The n-th word, then the place of a word, then the word after another, in a list of four."""
    items = draws.sample(WORDS, 3 if level == 0 else 4)
    place = draws.below(len(items) - (level == 2))
    if level == 0:
        wordings = ("Give the {place} word.", "Which word is {place}?")
        return Question(wordings, " ".join(items), items[place], {"place": ORDINALS[place]})
    slots = {"word": items[place]}
    if level == 1:
        return Question(
            ("Which place has {word}?", "Find the place of {word}."), " ".join(items), ORDINALS[place], slots
        )
    return Question(
        ("Which word comes after {word}?", "Find the word after {word}."), " ".join(items), items[place + 1], slots
    )
