"""Cutting the order into subsets, and their summary."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.curriculum.partition import cut, partition_summary
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import Record, ScoredRecord


def _record(record_id: str) -> Record:
    return Record(id=record_id, instruction=f"do {record_id}", input="", references=("done",))


def _scored(record_id: str, value: int, rouge_l: float | None) -> ScoredRecord:
    return ScoredRecord(
        id=record_id,
        num_prompt_tokens=10 * value,
        num_response_tokens=value,
        cross_entropy=value / 2,
        rouge_l=rouge_l,
    )


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_cut_when_any_number_of_subsets_then_keeps_every_row_once_in_order(num_rows: int, num_subsets: int) -> None:
    num_subsets = min(num_rows, num_subsets)
    ids = [str(index) for index in range(num_rows)]
    subsets = cut(ids, num_subsets)
    assert [subset.index for subset in subsets] == list(range(num_subsets))
    assert [record_id for subset in subsets for record_id in subset.record_ids] == ids
    assert {len(subset.record_ids) for subset in subsets[:-1]} <= {num_rows // num_subsets}


def test_cut_when_the_rows_do_not_divide_then_the_last_takes_the_rest() -> None:
    sizes = [len(subset.record_ids) for subset in cut([str(index) for index in range(11435)], 4)]
    assert sizes == [2858, 2858, 2858, 2861]


def test_cut_when_more_subsets_than_rows_then_says_how_many_are_possible() -> None:
    with pytest.raises(ConfigError, match=r"4 subsets of 3 rows in curriculum.stages.*stages to 3 or less") as raised:
        cut(["a", "b", "c"], 4)
    assert raised.value.exit_code == 2


def test_cut_when_there_are_no_rows_then_is_the_datas_fault() -> None:
    with pytest.raises(DataError, match="no rows"):
        cut([], 1)


def test_summary_when_measured_then_has_means_and_samples_of_every_subset() -> None:
    ids = ["a", "b", "c", "d", "e", "f"]
    rouge = [1.0, 0.5, 0.25, 0.25, 0.5, 0.0]
    scored = {i: _scored(i, n, r) for n, (i, r) in enumerate(zip(ids, rouge, strict=True), start=1)}
    first, second = partition_summary(cut(ids, 2), {i: _record(i) for i in ids}, scored)
    assert first == {
        "subset": 0,
        "num_rows": 3,
        "rouge_l": pytest.approx(175 / 3),
        "cross_entropy": 1.0,
        "num_prompt_tokens": 20.0,
        "num_response_tokens": 2.0,
        "sample_instructions": ["do a", "do b", "do c"],
    }
    assert second["rouge_l"] == pytest.approx(25.0)
    assert second["cross_entropy"] == 2.5
    assert json.loads(json.dumps(second)) == second


def test_summary_when_a_subset_is_small_then_names_each_row_once() -> None:
    records = {i: _record(i) for i in "abcdefg"}
    one, two, four = partition_summary(
        [*cut(["a"], 1), *cut(["b", "c"], 1), *cut(["d", "e", "f", "g"], 1)], records, {}
    )
    assert one["sample_instructions"] == ["do a"]
    assert two["sample_instructions"] == ["do b", "do c"]
    assert four["sample_instructions"] == ["do d", "do f", "do g"]


def test_summary_when_nothing_was_measured_then_means_are_none() -> None:
    ids = ["a", "b"]
    records = {i: _record(i) for i in ids}
    [unmeasured] = partition_summary(cut(ids, 1), records, {})
    assert (unmeasured["num_rows"], unmeasured["rouge_l"], unmeasured["cross_entropy"]) == (2, None, None)
    [no_rouge] = partition_summary(cut(ids, 1), records, {"a": _scored("a", 1, None), "b": _scored("b", 3, 0.5)})
    assert (no_rouge["rouge_l"], no_rouge["cross_entropy"]) == (None, 1.0)
