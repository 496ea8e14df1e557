"""The dev split."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_cli.data.sources import record_id
from pocl_cli.data.split import split_dev
from pocl_cli.errors import DataError
from pocl_cli.records import Record


def make_records(num_rows: int, num_copies: int = 1) -> list[Record]:
    """`num_rows` different rows, each `num_copies` times, copies far from each other."""
    records = []
    for copy in range(1, num_copies + 1):
        for row in range(num_rows):
            text = f"row {row}"
            row_id = record_id(text, "", (text,)) + (f"-{copy}" if copy > 1 else "")
            records.append(Record(row_id, text, "", (text,)))
    return records


def ids(records: tuple[Record, ...]) -> list[str]:
    return [record.id for record in records]


def test_split_when_made_twice_then_is_the_same_and_complete() -> None:
    records = make_records(100)
    train, dev = split_dev(records, 20, seed=10)
    assert (train, dev) == split_dev(records, 20, seed=10)
    assert (len(train), len(dev)) == (80, 20)
    assert sorted(ids(train) + ids(dev)) == sorted(record.id for record in records)


def test_split_when_the_seed_changes_then_holds_out_other_rows() -> None:
    records = make_records(100)
    assert ids(split_dev(records, 20, seed=10)[1]) != ids(split_dev(records, 20, seed=11)[1])


@given(st.integers(0, 2**32), st.integers(1, 39))
def test_split_when_the_file_order_changes_then_holds_out_the_same_rows(shuffle_seed: int, dev_size: int) -> None:
    records = make_records(40)
    shuffled = records.copy()
    random.Random(shuffle_seed).shuffle(shuffled)
    assert set(ids(split_dev(records, dev_size, 10)[1])) == set(ids(split_dev(shuffled, dev_size, 10)[1]))


def test_split_when_made_then_both_sides_keep_the_file_order() -> None:
    records = make_records(50)
    train, dev = split_dev(records, 10, seed=10)
    place = {record.id: index for index, record in enumerate(records)}
    for side in (train, dev):
        assert [place[row_id] for row_id in ids(side)] == sorted(place[row_id] for row_id in ids(side))


@pytest.mark.parametrize(("dev_size", "held_out"), [(30, 30), (31, 30), (2, 0), (3, 3)])
def test_split_when_rows_have_copies_then_copies_stay_on_one_side(dev_size: int, held_out: int) -> None:
    records = make_records(20, num_copies=3)
    if not held_out:
        with pytest.raises(DataError, match="copies stay on one side"):
            split_dev(records, dev_size, seed=10)
        return
    train, dev = split_dev(records, dev_size, seed=10)
    contents = [{record.instruction for record in side} for side in (train, dev)]
    assert contents[0].isdisjoint(contents[1])
    assert len(dev) == held_out


def test_split_when_a_few_rows_have_copies_then_single_rows_fill_up() -> None:
    records = make_records(30) + [Record(f"{'a' * 16}{end}", "x", "", ("x",)) for end in ("", "-2", "-3")]
    for seed in range(20):
        assert len(split_dev(records, 5, seed)[1]) == 5


def test_split_when_no_dev_rows_are_wanted_then_trains_on_all() -> None:
    records = make_records(3)
    assert split_dev(records, 0, seed=10) == (tuple(records), ())


@pytest.mark.parametrize("dev_size", [10, 1000])
def test_split_when_nothing_would_be_left_then_error_gives_advice(dev_size: int) -> None:
    with pytest.raises(DataError, match=rf"{dev_size} dev rows are asked for and 10 rows .* dataset\.dev_size"):
        split_dev(make_records(10), dev_size, seed=10)
