"""Cutting the order into subsets, and their summary."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.curriculum.partition import (
    SubsetSummary,
    cut,
    cut_at_quantiles,
    cut_at_thresholds,
    partition_summary,
    sample_places,
)
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import ScoredRecord

from ...support.scores import make_scores


def _measured(rouge: Sequence[float | None]) -> pa.Table:
    """A row each: its counts and cross entropy grow with its place."""
    rows = [
        ScoredRecord(f"{place}", 10 * (place + 1), place + 1, cross_entropy=(place + 1) / 2, rouge_l=value)
        for place, value in enumerate(rouge)
    ]
    return make_scores(rows).table


def _summary(subsets: Sequence[range], ordered: pa.Table) -> list[SubsetSummary]:
    return partition_summary(subsets, ordered, {place: f"do {place}" for place in range(ordered.num_rows)})


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_cut_when_any_number_of_subsets_then_keeps_every_row_once_in_order(num_rows: int, num_subsets: int) -> None:
    num_subsets = min(num_rows, num_subsets)
    subsets = cut(num_rows, num_subsets)
    assert len(subsets) == num_subsets
    assert [place for subset in subsets for place in subset] == list(range(num_rows))
    assert {len(subset) for subset in subsets[:-1]} <= {num_rows // num_subsets}


def test_cut_when_the_rows_do_not_divide_then_the_last_takes_the_rest() -> None:
    assert [len(subset) for subset in cut(11435, 4)] == [2858, 2858, 2858, 2861]


def test_cut_when_more_subsets_than_rows_then_says_how_many_are_possible() -> None:
    with pytest.raises(ConfigError, match=r"4 subsets of 3 rows in curriculum.stages.*stages to 3 or less") as raised:
        cut(3, 4)
    assert raised.value.exit_code == 2


def test_cut_when_there_are_no_rows_then_is_the_datas_fault() -> None:
    with pytest.raises(DataError, match="no rows"):
        cut(0, 1)


DIFFICULTIES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=40)


@settings(deadline=None)
@given(DIFFICULTIES, st.integers(1, 5))
def test_quantiles_when_rows_tie_then_equal_rows_share_a_subset(values: list[float], num_subsets: int) -> None:
    ordered = np.sort(np.array(values))
    try:
        subsets = cut_at_quantiles(ordered, num_subsets, None)
    except ConfigError:
        # Less than a subset's rows differ from the others: one would be empty.
        assert len(set(values)) < len(values) or num_subsets > len(values)
        return
    assert [place for subset in subsets for place in subset] == list(range(len(values)))
    assert len(subsets) == num_subsets
    for one, other in itertools.pairwise(subsets):
        assert ordered[one[-1]] < ordered[other[0]]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_quantiles_when_no_rows_tie_then_are_even(num_rows: int, num_subsets: int) -> None:
    num_subsets = min(num_rows, num_subsets)
    sizes = [len(subset) for subset in cut_at_quantiles(np.arange(float(num_rows)), num_subsets, None)]
    assert len(sizes) == num_subsets
    assert max(sizes) - min(sizes) <= 1


def test_quantiles_when_shares_are_given_then_cut_there() -> None:
    subsets = cut_at_quantiles(np.arange(100.0), 3, [0.29, 0.9])
    assert [len(subset) for subset in subsets] == [29, 61, 10]


def test_thresholds_when_given_then_a_row_at_a_border_is_below_it() -> None:
    ordered = np.array([1.0, 2.0, 2.0, 2.5, 3.0])
    assert cut_at_thresholds(ordered, [2.0, 2.6]) == (range(0, 3), range(3, 4), range(4, 5))


def test_thresholds_when_a_subset_is_empty_then_the_range_of_the_difficulty_is_named() -> None:
    with pytest.raises(ConfigError, match=r"subset 1 of 3 is empty in partition.at.*go from 1 to 3, and 2 of 3 differ"):
        cut_at_thresholds(np.array([1.0, 3.0, 3.0]), [1.5, 2.5])


def test_sample_places_when_a_subset_is_small_then_names_each_row_once() -> None:
    assert sample_places(range(0, 1)) == [0]
    assert sample_places(range(1, 3)) == [1, 2]
    assert sample_places(range(3, 7)) == [3, 5, 6]


def test_summary_when_measured_then_has_means_and_samples_of_every_subset() -> None:
    first, second = _summary(cut(6, 2), _measured([1.0, 0.5, 0.25, 0.25, 0.5, 0.0]))
    assert first == {
        "subset": 0,
        "num_rows": 3,
        "rouge_l": pytest.approx(175 / 3),
        "cross_entropy": 1.0,
        "num_prompt_tokens": 20.0,
        "num_response_tokens": 2.0,
        "sample_instructions": ["do 0", "do 1", "do 2"],
    }
    assert second["rouge_l"] == pytest.approx(25.0)
    assert second["cross_entropy"] == 2.5
    assert json.loads(json.dumps(second)) == second


def test_summary_when_nothing_was_measured_then_means_are_none() -> None:
    [unmeasured] = _summary(cut(2, 1), pa.table({"id": ["a", "b"]}))
    assert (unmeasured["num_rows"], unmeasured["rouge_l"], unmeasured["cross_entropy"]) == (2, None, None)


def test_summary_when_a_row_was_not_measured_then_the_mean_of_its_subset_is_none() -> None:
    no_rouge, measured = _summary(cut(4, 2), _measured([None, 0.5, 0.25, 0.75]))
    assert (no_rouge["rouge_l"], no_rouge["cross_entropy"]) == (None, 0.75)
    assert measured["rouge_l"] == 50.0
