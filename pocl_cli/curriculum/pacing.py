"""How large a share of the rows each stage trains on."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

Pacing: TypeAlias = Literal["linear", "root"]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

_POWERS: dict[Pacing, int] = {"linear": 1, "root": 2}


def shares(num_stages: int, pacing: Pacing, initial: float) -> list[float]:
    """The share c of stage i of n: c = (s·(1 − c0^p) + c0^p)^(1/p) with s = i/(n−1). One stage has all rows.

    c0 is `initial`; p is 1 for `linear` and 2 for `root` pacing. Platanios et al. 2019, arXiv 1903.09848.
    """
    power = _POWERS[pacing]
    first = initial**power
    before = [index / (num_stages - 1) for index in range(num_stages - 1)]
    return [min((done * (1 - first) + first) ** (1 / power), 1.0) for done in before] + [1.0]


def num_rows(num_stages: int, pacing: Pacing, initial: float, *, of: int) -> list[int]:
    """How many of `of` rows each stage trains on: its share, at least one."""
    return [max(round(share * of), 1) for share in shares(num_stages, pacing, initial)]
