"""One order from difficulties: ties, file order, and what is said about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.difficulty.ranking import average_ranks, rank_rows, tie_share, tie_shares, tie_warning
from pocl_cli.errors import NonFiniteError
from pocl_cli.records import ScoredRecord

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
        order = rank_rows(ids, np.array([value for _, value in variant], dtype=np.float64))
        assert sorted(order) == list(range(len(ids)))
        orders.append([ids[position] for position in order])
    assert orders[0] == orders[1]


def test_rank_rows_when_difficulties_tie_then_record_ids_decide() -> None:
    assert rank_rows(["c", "a", "b", "d"], np.array([1.0, 1.0, 0.0, 1.0])) == [2, 1, 0, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rank_rows_when_a_difficulty_is_not_finite_then_names_the_first_rows(bad: float) -> None:
    ids = [f"row{index}" for index in range(9)]
    with pytest.raises(NonFiniteError, match=r"difficulty of 7 of 9 rows.*row2, row3, row4, row5, row6 and 2 more"):
        rank_rows(ids, np.array([0.0, 1.0, *[bad] * 7]))


def test_tie_share_when_several_groups_tie_then_counts_the_largest() -> None:
    assert tie_share(np.array([0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 3.0, 4.0])) == 3 / 8
    assert tie_share(np.array([1.0, 2.0])) == 0.0
    assert tie_share(np.array([])) == 0.0


def _rows(rouge: list[float]) -> list[ScoredRecord]:
    return [
        ScoredRecord(id=str(i), num_prompt_tokens=1, num_response_tokens=1, cross_entropy=float(i), rouge_l=value)
        for i, value in enumerate(rouge)
    ]


def test_tie_shares_when_a_metric_ties_then_it_is_told_apart_from_the_others() -> None:
    rows = _rows([0.0, 0.0, 0.0, 0.5])
    shares = tie_shares(rows, {"rouge_l", "cross_entropy"}, np.array([1.0, 1.0, 2.0, 3.0]))
    assert shares == {"cross_entropy": 0.0, "rouge_l": 0.75, "difficulty": 0.5}
    assert tie_shares(rows, frozenset(), np.arange(4.0)) == {"difficulty": 0.0}


def test_tie_warning_when_most_rows_tie_then_names_metric_and_share() -> None:
    warning = tie_warning({"cross_entropy": 0.0, "rouge_l": 0.987, "difficulty": 0.5})
    assert warning is not None
    assert "98.7% in rouge_l" in warning
    assert "cross_entropy" not in warning
    assert "in difficulty" not in warning


def test_tie_warning_when_half_the_rows_tie_then_is_silent() -> None:
    assert tie_warning({"rouge_l": 0.5, "difficulty": 0.1}) is None
