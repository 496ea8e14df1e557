"""The demo in one go: teacher, student before, flat distillation and POCL on the same toy rows, and one table of them.

    python tools/demo.py              tiny models made here, about five minutes on two cores
    python tools/demo.py smollm2      SmolLM2-135M-Instruct → 6 of its layers on generated rows; fetches the model first

Every line that starts with `$` is a command that does the same from a shell. A second call finds everything done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir

from pocl_cli import log, tables
from pocl_cli.artifacts.manifest import Artifact
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import PoclError
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.dispatch import run_step
from pocl_cli.steps.result import StepResult

MODEL = Path("models/smollm2")


@dataclass(frozen=True)
class Arm:
    """One row of the table: a name, and the overrides that address the model."""

    name: str
    overrides: tuple[str, ...]
    model: str = "student"


def arms(which: str) -> list[Arm]:
    """The four models that are compared."""
    base = "demo" if which == "tiny" else "demo_smollm2"
    return [
        Arm("teacher", (f"experiment={base}",), "teacher"),
        Arm("student before", (f"experiment={base}",), "before"),
        Arm("flat KD", (f"experiment={base}_flat",)),
        Arm("POCL", (f"experiment={base}",)),
    ]


def main(which: str) -> None:
    """Runs what is missing and prints the table."""
    log.set_up_console_log()
    if which == "smollm2":
        from fetch_smollm2 import fetch

        fetch(MODEL)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        rows = [_row(arm) for arm in arms(which)]
    tables.results_table(
        "Demo: greedy answers on the test rows", ["model", "ROUGE-L", "exact match", "steps", "seconds"], rows
    )


def _row(arm: Arm) -> list[Any]:
    overrides = (*arm.overrides, "upstream=auto")
    chain = Chain(compose_run("distill", overrides))
    trained: Artifact | None = None
    if arm.model == "student":
        trained = _shown("distill", overrides, run_step(chain.run)).artifact
        model = "student"
    else:
        source = chain.teacher if arm.model == "teacher" else chain.student
        assert source is not None, "the demo has a teacher"
        model = str(source.weights)
        if "student" in source.identity:
            trained = chain.store.find(("students", source.identity["student"]))
    overrides = (*overrides, f"evaluation.model={model}")
    evaluated = _shown("evaluate", overrides, run_step(compose_run("evaluate", overrides)))
    (metrics,) = json.loads((evaluated.artifact.path / "metrics.json").read_text())["datasets"].values()
    steps, seconds = _cost(trained) if trained else (None, None)
    return [arm.name, metrics["rouge_l"]["mean"], metrics["exact_match"]["mean"], steps, seconds]


def _shown(step: str, overrides: Sequence[str], result: StepResult | None) -> StepResult:
    assert result is not None, "the demo plans nothing"
    log.get_logger().info("$ pocl %s %s   → %s", step, " ".join(overrides), result.artifact.path)
    return result


def _cost(student: Artifact) -> tuple[int, float]:
    """Optimizer steps and wall seconds of a training, from its manifest."""
    stages = json.loads((student.path / "stages.json").read_text())
    manifest = student.manifest
    begun, ended = (datetime.fromisoformat(time) for time in (manifest.started_at, manifest.created_at))
    return sum(row["steps"] for row in stages), (ended - begun).total_seconds()


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "tiny")
    except PoclError as error:
        sys.exit("\n".join(f"pocl: error: {one}" for one in getattr(error, "errors", [error])))
