"""Where a training run stands: the small values of a checkpoint. Random streams derive from the step and need none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl_cli.records import Convergence


def quality(figures: Mapping[str, float]) -> tuple[float, float]:
    """What the states of a stage are compared by: dev ROUGE-L, and dev cross entropy where that is equal or absent."""
    return figures.get("dev_rouge_l", 0.0), -figures["dev_cross_entropy"]


@dataclass(frozen=True)
class Best:
    """The best state of a stage by `quality`; `dev_rouge_l` is None where nothing is generated.

    `sha256` is that of the file which holds its weights.
    """

    step: int
    dev_rouge_l: float | None
    dev_cross_entropy: float
    sha256: str

    def is_beaten_by(self, figures: Mapping[str, float]) -> bool:
        """Whether the dev figures are those of a better state."""
        return quality(figures) > (self.dev_rouge_l or 0.0, -self.dev_cross_entropy)


@dataclass(frozen=True)
class TrainingState:
    """What is done.

    Attributes:
        step: optimizer steps over all stages.
        stage: the current stage; the number of stages where all are done.
        stage_step: optimizer steps in the current stage.
        num_tokens: response tokens trained on.
        metrics_bytes: size of metrics.jsonl when the state was saved.
        best: the current stage's best state, where the best one is handed on.
        dev_due: the dev evaluation after the last step was given up and comes next.
        watched: the best value in the current stage of the figure by which it may end early.
        stale: dev evaluations since then.
        converged: the current stage ends here.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    num_tokens: int = 0
    metrics_bytes: int = 0
    best: Best | None = None
    dev_due: bool = False
    watched: float | None = None
    stale: int = 0
    converged: bool = False

    def after(self, figures: Mapping[str, float], rule: Convergence | None, num_epochs: int) -> TrainingState:
        """The state after a dev evaluation at the end of the stage's `num_epochs`-th epoch: it may have converged."""
        if rule is None or rule.metric is None:
            return self
        value = figures[rule.metric]
        better = max if rule.metric == "dev_rouge_l" else min
        improved = self.watched is None or (value != self.watched and better(value, self.watched) == value)
        stale = 0 if improved else self.stale + 1
        converged = stale >= rule.patience and num_epochs >= rule.min_epochs
        return replace(self, watched=value if improved else self.watched, stale=stale, converged=converged)

    def next_stage(self) -> TrainingState:
        """The state at the start of the next stage."""
        return TrainingState(self.step, self.stage + 1, 0, self.num_tokens, self.metrics_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainingState:
        best = values["best"]
        return TrainingState(**{**values, "best": Best(**best) if best else None})
