from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pocl_cli.seeds import derive_seed, permutation


def test_derive_seed_when_asked_again_then_it_is_the_same_on_any_machine() -> None:
    digest = hashlib.sha256(b"int:10\x1fstr:order\x1fint:3").digest()
    assert derive_seed(10, "order", 3) == int.from_bytes(digest[:8], "big") >> 1


def test_derive_seed_when_any_part_differs_then_the_seed_does() -> None:
    seeds = [derive_seed(*parts) for parts in [(1, 2), (2, 1), (12,), (1, "2"), ("1", 2), (1, 2, ""), ("1\x1f2",)]]
    assert len(set(seeds)) == len(seeds)


def test_derive_seed_when_made_then_it_fits_torch_and_numpy() -> None:
    assert all(0 <= derive_seed(n) < 2**63 for n in range(1000))


def test_derive_seed_when_a_part_is_no_utf8_then_it_still_has_a_seed() -> None:
    assert derive_seed("\ud800") != derive_seed("\ud801")


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutation_when_made_then_it_holds_every_place_once(size: int) -> None:
    assert sorted(permutation(size, 10, "epoch", 0).tolist()) == list(range(size))


def test_permutation_when_asked_again_then_it_is_the_same_and_parts_change_it() -> None:
    first = permutation(100, 10, "epoch", 0)
    assert np.array_equal(first, permutation(100, 10, "epoch", 0))
    assert not np.array_equal(first, permutation(100, 10, "epoch", 1))
    assert not np.array_equal(first, permutation(100, 20, "epoch", 0))


def test_permutation_when_a_library_is_updated_then_runs_of_old_stay_what_they_were() -> None:
    assert permutation(8, 10, "golden").tolist() == GOLDEN


GOLDEN = [2, 7, 0, 4, 1, 3, 6, 5]
