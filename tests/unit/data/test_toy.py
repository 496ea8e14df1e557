"""The toy instruction set: right answers, disjoint splits, and the same rows from the same seed everywhere."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
import yaml

from pocl_cli.config import conf_dir
from pocl_cli.data.generators.toy import ToyInstructions, split_of
from pocl_cli.data.generators.toy_tasks import CLASSES, FAMILIES, LEVELS, ORDINALS, WORDS, Draws, Question
from pocl_cli.errors import ConfigError
from pocl_cli.registry import generators
from pocl_cli.schema import DatasetConfig

TRAIN = ToyInstructions().rows("train", 4500, 10)
TEST = ToyInstructions().rows("test", 2000, 10)
GOLDEN = "0f2d1b16f30664c0abe15e0b6d6f4e8b6293ea4273fa0ff685b985b6b4454193"


def rows_of(category: str) -> list[dict[str, str]]:
    found = [row for row in (*TRAIN, *TEST) if row["category"] == category]
    assert len(found) > 100
    return found


def test_rows_when_first_ones_are_hashed_then_are_those_of_every_machine_and_python_version() -> None:
    rows = [row for split in ("train", "test") for row in ToyInstructions().rows(split, 360, 10)]
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest() == GOLDEN


def test_rows_when_more_are_asked_for_then_begin_with_the_same() -> None:
    assert ToyInstructions().rows("train", 50, 10) == TRAIN[:50]


def test_rows_when_seed_differs_then_differ() -> None:
    assert ToyInstructions().rows("train", 50, 11) != TRAIN[:50]


def test_rows_when_counted_then_hold_every_family_at_every_level_equally_often() -> None:
    counts = Counter(row["category"] for row in TRAIN)
    assert len(FAMILIES) == 12
    assert counts == {f"{family}/{level}": 125 for family in FAMILIES for level in LEVELS}


def test_rows_when_made_then_none_is_there_twice() -> None:
    for rows in (TRAIN, TEST):
        assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)


def test_splits_when_train_has_as_many_rows_as_a_teacher_needs_then_no_test_question_is_among_them() -> None:
    train = ToyInstructions().rows("train", 112_500, 10)
    test = [row for seed in (10, 11) for row in ToyInstructions().rows("test", 2000, seed)]
    assert len({(row["instruction"], row["input"]) for row in train}) == len(train)
    assert not {(row["instruction"], row["input"]) for row in train} & {
        (row["instruction"], row["input"]) for row in test
    }


def test_split_when_a_question_is_worded_in_another_way_then_is_the_same() -> None:
    draws = Draws("wordings")
    for family, ask in FAMILIES.items():
        for level in range(3):
            question = ask(draws, level)
            other = Question(question.wordings[::-1], question.input, question.output, question.slots)
            assert split_of(family, question) == split_of(family, other)


def test_split_when_many_questions_are_drawn_then_a_fifth_is_test() -> None:
    draws = Draws("share")
    share = sum(split_of("copy", FAMILIES["copy"](draws, 2)) == "test" for _ in range(4000)) / 4000
    assert 0.17 < share < 0.23


def test_split_when_unknown_then_error_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown split 'tests'.*did you mean 'test'"):
        ToyInstructions().rows("tests", 1, 10)


def test_rows_when_more_are_asked_for_than_exist_then_error_says_how_many() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.num_rows.*at most \d+"):
        ToyInstructions().rows("test", 200_000, 10)


def test_generator_when_named_in_a_configuration_then_is_found() -> None:
    assert generators.get("toy") is ToyInstructions


@pytest.mark.parametrize("level", LEVELS)
def test_answers_of_list_tasks_when_worked_out_again_then_are_right(level: str) -> None:
    for row in rows_of(f"copy/{level}"):
        assert row["output"] == row["input"]
    for row in rows_of(f"reverse/{level}"):
        assert row["output"].split() == row["input"].split()[::-1]
    for row in rows_of(f"deduplicate/{level}"):
        words = row["input"].split()
        assert row["output"].split() == sorted(set(words), key=words.index)
        assert len(set(words)) < len(words)
    for row in rows_of(f"sort/{level}"):
        ordered = sorted(
            row["input"].split(), reverse="down" in row["instruction"] or "from largest" in row["instruction"]
        )
        assert row["output"].split() == ordered


@pytest.mark.parametrize("level", LEVELS)
def test_answers_of_replace_when_worked_out_again_then_are_right(level: str) -> None:
    for row in rows_of(f"replace/{level}"):
        _, old, _, new = row["instruction"].rstrip(".").split()
        assert row["output"].split() == [new if word == old else word for word in row["input"].split()]
        assert old in row["input"].split()


@pytest.mark.parametrize("level", LEVELS)
def test_answers_of_extract_and_lookup_when_worked_out_again_then_are_right(level: str) -> None:
    for row in rows_of(f"extract/{level}"):
        record = dict(field.split() for field in row["input"].split(", "))
        asked = [word for word in row["instruction"].strip(".?").split() if word in record]
        assert row["output"] == " ".join(record[name] for name in asked)
    for row in rows_of(f"lookup/{level}"):
        line = next(
            line.split()
            for line in row["input"].split("\n")
            if line.split()[0] == row["instruction"].strip(".?").split()[-1]
        )
        is_colour = "colour" in row["instruction"].split()
        assert row["output"] == next(value for value in line[1:] if (value in CLASSES["colour"]) == is_colour)


def test_answers_of_classify_when_worked_out_again_then_are_right() -> None:
    for row in rows_of("classify/easy"):
        rule, other = row["instruction"].rstrip(".").split(", else ")
        yes, limit = rule.split()[1], rule.split()[-1]
        assert row["output"] == (yes if int(row["input"]) > int(limit) else other)
    for row in rows_of("classify/medium"):
        rule, other = row["instruction"].rstrip(".").split(", else ")
        assert row["output"] == (rule.split()[1] if row["input"] in CLASSES[rule.split()[-1]] else other)
    for row in rows_of("classify/hard"):
        rule, other = row["instruction"].rstrip(".").split(", else ")
        assert row["output"] == (rule.split()[1] if rule.split()[-1] in row["input"].split() else other)


@pytest.mark.parametrize("level", LEVELS)
def test_answers_of_add_and_extreme_when_worked_out_again_then_are_right(level: str) -> None:
    for row in rows_of(f"add/{level}"):
        words = row["instruction"].strip(".?").split()
        numbers = [int(word) for word in words if word.isdigit()]
        assert row["input"] == ""
        assert row["output"] == f"{sum(numbers)} {words[-1]}"
    for row in rows_of(f"extreme/{level}"):
        pick = min if any(word in row["instruction"] for word in ("smallest", "minimum", "lowest")) else max
        assert int(row["output"]) == pick(map(int, row["input"].split()))


def test_answers_of_count_and_position_when_worked_out_again_then_are_right() -> None:
    for level in LEVELS:
        for row in rows_of(f"count/{level}"):
            items, last = row["input"].split(), row["instruction"].strip(".?").split()[-1]
            right = {
                "easy": len(items),
                "medium": items.count(last),
                "hard": sum(i in CLASSES.get(last, ()) for i in items),
            }
            assert int(row["output"]) == right[level]
    for row in rows_of("position/easy"):
        place = next(word for word in row["instruction"].strip(".?").split() if word in ORDINALS)
        assert row["output"] == row["input"].split()[ORDINALS.index(place)]
    for row in rows_of("position/medium"):
        word = row["instruction"].strip(".?").split()[-1]
        assert row["output"] == ORDINALS[row["input"].split().index(word)]
    for row in rows_of("position/hard"):
        items, word = row["input"].split(), row["instruction"].strip(".?").split()[-1]
        assert row["output"] == items[items.index(word) + 1]


def test_words_when_compared_then_are_32_that_no_stemmer_confuses() -> None:
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    assert len({tuple(tokenize(word, PorterStemmer())) for word in WORDS}) == len(WORDS) == 32
    assert all(word == word.lower() for word in WORDS)


def test_draws_when_made_from_the_same_text_then_are_the_same_and_fair() -> None:
    assert Draws("a").sample(range(9), 9) == Draws("a").sample(range(9), 9)
    assert Draws("a").sample(range(9), 9) != Draws("b").sample(range(9), 9)
    draws = Draws("fair")
    counts = Counter(draws.below(4) for _ in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(900 < count < 1100 for count in counts.values())


@pytest.mark.parametrize(("name", "num_rows", "dev_size"), [("toy", 4500, 500), ("toy_test", 2000, 0)])
def test_preset_when_read_then_names_rows_that_the_generator_makes(name: str, num_rows: int, dev_size: int) -> None:
    config = DatasetConfig.model_validate(yaml.safe_load((conf_dir() / "dataset" / f"{name}.yaml").read_text()))
    assert (config.name, config.generator, config.num_rows, config.dev_size) == (name, "toy", num_rows, dev_size)
    assert config.split == ("test" if name == "toy_test" else "train")
