"""A random order: the control that any curriculum has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.registry import difficulty_measurers

_MANTISSA_BITS = 53


@difficulty_measurers.register("random")
@dataclass(frozen=True, kw_only=True)
class Random:
    """Difficulty uniform in [0, 1), a hash of (seed, record id): it reads no measurement and no row order.

    The random-partition control of the POCL comparison, arXiv 2506.05695.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    seed: int

    def __call__(self, scores: Scores) -> FloatArray:
        digests = bytearray()
        for record_id in scores.each_id():
            digests += hashlib.sha256(f"{self.seed}:{record_id}".encode()).digest()[:8]
        drawn = np.frombuffer(digests, dtype=">u8") >> (64 - _MANTISSA_BITS)
        return np.ldexp(drawn.astype(np.float64), -_MANTISSA_BITS)
