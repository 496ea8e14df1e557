"""Every random stream of the program is a pure function of what it is for, so that resuming needs no saved states."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for the stream that `parts` name (the user's seed, the purpose, indices)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:8], "big") >> 1


def derive_fraction(*parts: int | str) -> float:
    """A number in [0, 1) of the stream that `parts` name."""
    return (derive_seed(*parts) >> 10) / 2**53


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of 0..size-1, the same on every platform and numpy version: raw Philox words, sorted."""
    words = np.random.Philox(key=derive_seed(*parts)).random_raw(size)
    return np.argsort(words, kind="stable")
