"""One order from difficulties: ties, file order, and what is said about them."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.difficulty.ranking import average_ranks, rank_rows, tie_share, tie_shares, tie_warning
from pocl_cli.difficulty.scores import Scores
from pocl_cli.errors import NonFiniteError
from pocl_cli.records import ScoredRecord

from ...support.scores import make_scores

FEW_VALUES = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 7.0]), max_size=30)


@settings(deadline=None)
@given(FEW_VALUES)
def test_average_ranks_when_values_tie_then_are_those_of_scipy(values: list[float]) -> None:
    array = np.array(values, dtype=np.float64)
    assert average_ranks(array).tolist() == scipy.stats.rankdata(array, method="average").tolist()


@settings(deadline=None)
@given(FEW_VALUES, st.randoms(use_true_random=False))
def test_rank_rows_when_the_file_is_shuffled_then_the_order_of_ids_is_the_same(values: list[float], shuffle) -> None:  # type: ignore[no-untyped-def]
    rows = [(f"{(index * 2654435761) % 2**32:08x}", value) for index, value in enumerate(values)]
    shuffled = list(rows)
    shuffle.shuffle(shuffled)
    orders = []
    for variant in (rows, shuffled):
        ids = [record_id for record_id, _ in variant]
        order = rank_rows(
            pa.chunked_array([ids], pa.string()), np.array([value for _, value in variant], dtype=np.float64)
        )
        order = order.tolist()
        assert sorted(order) == list(range(len(ids)))
        orders.append([ids[position] for position in order])
    assert orders[0] == orders[1]


def test_rank_rows_when_difficulties_tie_then_record_ids_decide() -> None:
    ids = pa.chunked_array([["c", "a"], ["b", "d"]])
    assert rank_rows(ids, np.array([1.0, 1.0, 0.0, 1.0])).tolist() == [2, 1, 0, 3]


# What real ids and foreign ones are told apart by: copies, lengths, one to four bytes of UTF-8 beside each other.
IDS = st.text(st.sampled_from("ab-2\x00Zé\u07ff\ue000\uffee\U0001f600"), max_size=4) | st.text(max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(IDS, st.sampled_from([-1.5, -0.0, 0.0, 7.0])), max_size=30, unique_by=lambda row: row[0]))
def test_rank_rows_when_ids_are_any_text_then_are_in_the_order_of_pythons_strings(
    rows: list[tuple[str, float]],
) -> None:
    ids = [record_id for record_id, _ in rows]
    values = [value for _, value in rows]

    order = rank_rows(pa.chunked_array([ids[:5], ids[5:]], pa.string()), np.array(values, dtype=np.float64))

    assert order.tolist() == sorted(range(len(ids)), key=lambda position: (values[position], ids[position]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rank_rows_when_a_difficulty_is_not_finite_then_names_the_first_rows(bad: float) -> None:
    ids = [f"row{index}" for index in range(9)]
    with pytest.raises(NonFiniteError, match=r"difficulty of 7 of 9 rows.*row2, row3, row4, row5, row6 and 2 more"):
        rank_rows(pa.chunked_array([ids]), np.array([0.0, 1.0, *[bad] * 7]))


def test_tie_share_when_several_groups_tie_then_counts_the_largest() -> None:
    assert tie_share(np.array([0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 3.0, 4.0])) == 3 / 8
    assert tie_share(np.array([1.0, 2.0])) == 0.0
    assert tie_share(np.array([])) == 0.0


def _scores(rouge: list[float]) -> Scores:
    return make_scores([ScoredRecord(str(i), 1, 1, float(i), rouge_l=value) for i, value in enumerate(rouge)])


def test_tie_shares_when_a_metric_ties_then_it_is_told_apart_from_the_others() -> None:
    scores = _scores([0.0, 0.0, 0.0, 0.5])
    shares = tie_shares(scores, {"rouge_l", "cross_entropy"}, np.array([1.0, 1.0, 2.0, 3.0]))
    assert shares == {"cross_entropy": 0.0, "rouge_l": 0.75, "difficulty": 0.5}
    assert tie_shares(scores, frozenset(), np.arange(4.0)) == {"difficulty": 0.0}


def test_tie_warning_when_most_rows_tie_then_names_metric_and_share() -> None:
    warning = tie_warning({"cross_entropy": 0.0, "rouge_l": 0.987, "difficulty": 0.5})
    assert warning is not None
    assert "98.7% in rouge_l" in warning
    assert "cross_entropy" not in warning
    assert "in difficulty" not in warning


def test_tie_warning_when_half_the_rows_tie_then_is_silent() -> None:
    assert tie_warning({"rouge_l": 0.5, "difficulty": 0.1}) is None
