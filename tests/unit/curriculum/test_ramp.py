"""Ramps over stages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_cli.curriculum.ramp import Ramp

FINITE = st.floats(-100, 100)


def test_ramp_when_four_stages_then_has_the_papers_values() -> None:
    assert Ramp(start=1.0, end=2.0).values(4) == pytest.approx([1, 4 / 3, 5 / 3, 2], abs=1e-12)
    assert Ramp(start=0.7, end=1.0).values(4) == pytest.approx([0.7, 0.8, 0.9, 1.0], abs=1e-12)


def test_ramp_when_one_stage_then_is_its_end() -> None:
    assert Ramp(start=0.7, end=1.0).values(1) == [1.0]


@settings(deadline=None)
@given(FINITE, FINITE, st.integers(2, 50))
def test_ramp_when_several_stages_then_goes_from_start_to_end_in_equal_steps(start: float, end: float, n: int) -> None:
    values = Ramp(start=start, end=end).values(n)
    assert len(values) == n
    assert (values[0], values[-1]) == (start, end)
    assert values == pytest.approx([start + (end - start) * index / (n - 1) for index in range(n)], abs=1e-11)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_ramp_when_between_two_ratios_then_never_leaves_them(start: float, end: float, n: int) -> None:
    assert all(min(start, end) <= value <= max(start, end) for value in Ramp(start=start, end=end).values(n))
