"""`pocl distill`: train the student stage by stage."""

from __future__ import annotations

import time

from pocl_cli import tables
from pocl_cli.artifacts.manifest import difference
from pocl_cli.log import get_logger
from pocl_cli.processes.job import FOLDER, LOCK
from pocl_cli.records import answers_of, asks_teacher
from pocl_cli.run import Run
from pocl_cli.steps import checks, plan
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.parts import do_part
from pocl_cli.steps.result import StepResult, obtain
from pocl_cli.steps.stored_answers import obtain_answers
from pocl_cli.steps.train import Trained


def run(run: Run) -> StepResult | None:
    """Trains through the stages and writes the student; None where only the plan was asked for."""
    chain = Chain(run)
    if run.config.plan.enabled:
        plan.show(chain)
        return None
    key = chain.student_key
    found = chain.store.find(key)
    if found is not None:
        return StepResult(found, made=False, figures=dict(found.manifest.extra))
    inputs = _inputs(chain)
    with chain.store.open_work(key) as work:
        if work.finished is not None:
            return StepResult(work.finished, made=False, figures=dict(work.finished.manifest.extra))
        _name_interrupted_neighbours(chain)
        started = time.perf_counter()
        checks.refuse_early(checks.of_training(chain))
        trained = Trained(**do_part("train", chain, work))
        artifact = work.commit(
            config=run.resolved,
            inputs=inputs,
            command=run.command,
            seed=run.config.train.seed,
            extra=trained.figures,
            audit=trained.audit,
            exclude=["checkpoints", "consumed", FOLDER, LOCK],
        )
    tables.summary_panel(
        "distilled" if asks_teacher(run.config.kd_method) else "trained",
        {
            "steps": trained.num_steps,
            "response tokens": trained.num_tokens,
            **trained.figures,
            "wall_seconds": time.perf_counter() - started,
        },
    )
    return StepResult(artifact, made=True, figures=dict(trained.figures))


def _inputs(chain: Chain) -> dict[str, str]:
    """The artifacts that this one is made from, made first where `upstream=auto` asks for it."""
    inputs = {}
    if chain.config.curriculum.needs_partition:
        inputs["partition"] = obtain(chain.run, "partition", chain.partition_key, chain.store).id
    for who in answers_of(chain.config.kd_method):
        inputs[f"{who}_answers"] = obtain_answers(chain, who).id
    lessons = [(f"teacher_{stage}", lesson.teacher) for stage, lesson in enumerate(chain.lessons)]
    for part, source in (("student", chain.student), ("teacher", chain.teacher), *lessons):
        if source is not None and "student" in source.identity:
            inputs[part] = str(source.identity["student"])
    return inputs


def _name_interrupted_neighbours(chain: Chain) -> None:
    key = chain.student_key
    for other in chain.store.interrupted("students", key.slug):
        if other.id != key.id:
            changes = difference(other.identity, key.identity)
            get_logger().info(
                "an interrupted run %s differs in %s; this is another run, from its start", other.id, "; ".join(changes)
            )
