"""Fusion of several difficulties: what fusions share, which is their members and their ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from pocl_cli.difficulty.ranking import average_ranks
from pocl_cli.difficulty.scores import FloatArray, Scores
from pocl_cli.errors import ConfigError
from pocl_cli.registry import difficulty_measurers


def _written_out(member: Any) -> Any:
    """`rouge_l` is short for {name: rouge_l, weight: 1}."""
    if isinstance(member, str):
        return {"name": member, "weight": 1.0}
    return {"weight": 1.0, **member} if isinstance(member, dict) else member


Members = Annotated[tuple[Annotated[dict[str, Any], BeforeValidator(_written_out)], ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Fusion(ABC):
    """One difficulty from the ranks (1 = easiest, ties share the mean rank) that several give to the rows.

    Raises ValueError (a validation error in a configuration) where a member is not one, or its weight is not above 0.

    Attributes:
        members: any difficulties, each with its own keys and a `weight`.
    """

    members: Members = ({"name": "rouge_l", "weight": 1.0}, {"name": "cross_entropy", "weight": 1.0})

    def __post_init__(self) -> None:
        assert self._measurers, "a fusion has members"

    @property
    def needs(self) -> frozenset[str]:
        """The columns that the members read."""
        return frozenset().union(*(measurer.needs for _, measurer in self._measurers))

    def __call__(self, scores: Scores) -> FloatArray:
        ranks = [average_ranks(measurer(scores)) for _, measurer in self._measurers]
        return self._fused(ranks, [weight for weight, _ in self._measurers])

    @abstractmethod
    def _fused(self, ranks: Sequence[FloatArray], weights: Sequence[float]) -> FloatArray:
        """The difficulty `[N]` from the members' ranks `[N]` and weights."""

    @cached_property
    def _measurers(self) -> list[tuple[float, Any]]:
        """Weight and measurer of every member."""
        return [_member(values) for values in self.members]


def _member(values: dict[str, Any]) -> tuple[float, Any]:
    weight = values["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"the weight of {values.get('name')!r} is {weight!r}, and a weight is a number above 0")
    own = {key: value for key, value in values.items() if key != "weight"}
    try:
        return float(weight), difficulty_measurers.build(own)
    except ConfigError as error:
        raise ValueError(f"a member of the fusion is wrong: {error}") from error
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"member {values['name']!r} of the fusion is wrong: {key}: {first['msg']}") from error
