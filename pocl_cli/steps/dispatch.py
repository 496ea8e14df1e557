"""Runs a step: what is finished already is found before anything heavy is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pocl_cli.records import answers_of
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.predictions import evaluate_predictions, report
from pocl_cli.steps.result import StepResult

if TYPE_CHECKING:
    from pocl_cli.run import Run


def run_step(run: Run) -> StepResult | None:
    """The result of `run`, found or made; None where only a plan was asked for."""
    if run.step != "compare" and not run.config.plan.enabled:
        found = find_finished(run)
        if found is not None:
            Chain(run).store.tidy()  # a run that was killed after its artifact was in place left something behind
            return found
    if run.step == "evaluate" and run.config.evaluation.predictions is not None:
        return evaluate_predictions(run)
    result: StepResult | None = importlib.import_module(f"pocl_cli.steps.{run.step}").run(run)
    return result


def find_finished(run: Run) -> StepResult | None:
    """What the step would make, where it exists; a missing upstream artifact is made or told of first (`obtain`)."""
    chain = Chain(run)
    if run.step == "evaluate":
        finished = chain.store.find(chain.evaluation_key)
        return report(StepResult(finished, made=False)) if finished else None
    if run.step == "score":
        answers = [chain.answers_key(who) for who in answers_of(run.config.kd_method)]
        keys = [*answers, *(chain.score_key(who) for who in chain.measured)]
    else:
        keys = [chain.partition_key if run.step == "partition" else chain.student_key]
    artifacts = [chain.store.find(key) for key in keys]
    last = artifacts[-1]
    if last is None or None in artifacts:
        return None
    return StepResult(last, made=False, figures=dict(last.manifest.extra))
