"""Ramps over stages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.curriculum.ramp import Ramp

FINITE = st.floats(-100, 100)


def test_ramp_when_four_stages_then_has_the_papers_values() -> None:
    assert Ramp(start=1.0, end=2.0).over(4) == pytest.approx([1, 4 / 3, 5 / 3, 2], abs=1e-12)
    assert Ramp(start=0.7, end=1.0).over(4) == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-12)


def test_ramp_when_one_stage_then_is_its_end() -> None:
    assert Ramp(start=0.7, end=1.0).over(1) == [1.0]


@settings(deadline=None)
@given(FINITE, FINITE, st.integers(2, 50))
def test_ramp_when_several_stages_then_goes_from_start_to_end_in_equal_steps(start: float, end: float, n: int) -> None:
    values = Ramp(start=start, end=end).over(n)
    assert len(values) == n
    assert (values[0], values[-1]) == (start, end)
    assert values == pytest.approx([start + (end - start) * index / (n - 1) for index in range(n)], abs=1e-11)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_ramp_when_between_two_ratios_then_never_leaves_them(start: float, end: float, n: int) -> None:
    assert all(min(start, end) <= value <= max(start, end) for value in Ramp(start=start, end=end).over(n))


@settings(deadline=None)
@given(FINITE, FINITE, st.integers(1, 50), st.sampled_from(["linear", "step", "cosine"]))
def test_ramp_when_of_any_shape_then_has_its_ends_and_moves_one_way(
    start: float, end: float, n: int, shape: Any
) -> None:
    values = Ramp(start=start, end=end, shape=shape).over(n)
    assert len(values) == n
    assert values[-1] == end
    assert n == 1 or values[0] == start
    steps = [(other - one) * (1 if end >= start else -1) for one, other in itertools.pairwise(values)]
    assert all(step >= -1e-11 for step in steps)


def test_ramp_when_a_step_then_changes_in_the_middle() -> None:
    shape = {n: Ramp(start=0.0, end=1.0, shape="step").over(n) for n in (1, 2, 3, 4)}
    assert shape == {1: [1.0], 2: [0.0, 1.0], 3: [0.0, 1.0, 1.0], 4: [0.0, 0.0, 1.0, 1.0]}


def test_ramp_when_a_cosine_then_moves_slowly_at_both_ends() -> None:
    assert Ramp(start=1.0, end=3.0, shape="cosine").over(5) == pytest.approx([1, 2 - 2**0.5 / 2, 2, 2 + 2**0.5 / 2, 3])


def test_ramp_when_values_are_listed_then_they_decide_alone() -> None:
    assert Ramp(start=1.0, end=3.0, values=(5.0, 4.0)).over(2) == [5.0, 4.0]
