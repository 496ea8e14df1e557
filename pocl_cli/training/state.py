"""Where a training run stands: the small values of a checkpoint. Random streams derive from the step and need none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Best:
    """The state of highest dev ROUGE-L in a stage (the lower dev cross entropy where two are equal)."""

    step: int
    dev_rouge_l: float
    dev_cross_entropy: float

    def is_beaten_by(self, other: Best) -> bool:
        return (other.dev_rouge_l, -other.dev_cross_entropy) > (self.dev_rouge_l, -self.dev_cross_entropy)


@dataclass(frozen=True)
class TrainingState:
    """What is done: `step` counts over all stages, `stage_step` in the current one, `metrics_bytes` of metrics.jsonl."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    num_tokens: int = 0
    metrics_bytes: int = 0
    best: Best | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainingState:
        best = values.pop("best")
        return TrainingState(**values, best=Best(**best) if best else None)
