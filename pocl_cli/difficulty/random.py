"""A random order: the control that any curriculum has to beat."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocl_cli.difficulty.columns import FloatArray
from pocl_cli.records import ScoredRecord
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

    def __call__(self, rows: Sequence[ScoredRecord]) -> FloatArray:
        return np.array([self._uniform(row.id) for row in rows], dtype=np.float64)

    def _uniform(self, record_id: str) -> float:
        digest = hashlib.sha256(f"{self.seed}:{record_id}".encode()).digest()
        return math.ldexp(int.from_bytes(digest[:8], "big") >> (64 - _MANTISSA_BITS), -_MANTISSA_BITS)
