"""Imports without looking for garbage."""

from __future__ import annotations

import gc

import pytest

from pocl_cli.imports import uncollected


def test_uncollected_when_left_by_whatever_way_then_python_collects_again() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled(), "the outer one is still open"
    assert gc.isenabled()

    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
