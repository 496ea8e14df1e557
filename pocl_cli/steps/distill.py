"""`pocl distill`: train the student stage by stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.artifacts.manifest import difference
from pocl_cli.config import Run
from pocl_cli.curriculum.stage_table import StageRow, stage_table
from pocl_cli.errors import ArtifactError
from pocl_cli.evaluation.rouge import rouge_l
from pocl_cli.log import Advance, get_logger, progress
from pocl_cli.models.attention import recompute_layers
from pocl_cli.models.card import model_card
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, load_model, load_tokenizer
from pocl_cli.models.vocabulary import align_vocabularies
from pocl_cli.records import Stage, Subset
from pocl_cli.schema import PoclConfig, TrainConfig
from pocl_cli.steps import checks, plan
from pocl_cli.steps.answers import measure_and_answer
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.partition import read_partition
from pocl_cli.steps.result import StepResult, obtain
from pocl_cli.steps.rows import TrainingRows, training_rows
from pocl_cli.steps.teacher import teacher_of
from pocl_cli.steps.weights import loadable
from pocl_cli.training import checkpoint
from pocl_cli.training.loop import LoopSettings, TrainingJob, train
from pocl_cli.training.stored_teacher import StoredTeacher
from pocl_cli.training.student import StudentWithObjective

if TYPE_CHECKING:
    from pocl_cli.artifacts.work import Work


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
        hardware = set_up_hardware(run.config.hardware)

        # ── rows and stages ───────────────────────────────────────────────────────────────────────────────────────
        checks.refuse_early(checks.of_training(chain))
        rows = training_rows(run.config, load_tokenizer(chain.student))
        stages = run.config.curriculum(_subsets(chain, rows))
        table = stages_of(run.config.train, stages)
        durable.write_json(work.path / "stages.json", table)
        tables.stage_table(table)

        # ── models ────────────────────────────────────────────────────────────────────────────────────────────────
        loaded = load_model(
            loadable(chain, chain.student),
            device=hardware.device,
            dtype_override=torch.float32,
            dropout=run.config.student.dropout,
        )
        student = _student(chain, loaded, rows, hardware)
        checkpoint.refuse_other_teacher(work.path / "checkpoints", _teacher_source(student))

        # ── train ─────────────────────────────────────────────────────────────────────────────────────────────────
        steps = sum(row["steps"] for row in table)
        with ExitStack() as stack:
            tracker = stack.enter_context(run.config.tracker.open(_tracker_folder(chain), key.slug, dict(run.resolved)))
            show = stack.enter_context(progress(key.slug, steps))
            job = _job(run.config, student, loaded, rows, stages, table, work.path, hardware, tracker.log, show)
            with memory_errors_explained(hardware, "training"):
                state = train(job)

        if isinstance(student.teacher, StoredTeacher):
            get_logger().info("teacher tokens saved by its stored hidden states: %s", student.teacher.savings())

        # ── write ─────────────────────────────────────────────────────────────────────────────────────────────────
        figures = _kept_dev_figures(work.path, job.settings.keep_best)
        _write_model(work, chain, loaded, table, figures)
        artifact = work.commit(
            config=run.resolved,
            inputs=inputs,
            command=run.command,
            seed=run.config.train.seed,
            extra=figures,
            exclude=["checkpoints", "consumed"],
        )
    tables.summary_panel(
        "distilled" if run.config.kd_method.needs_teacher else "trained",
        {
            "steps": state.step,
            "response tokens": state.num_tokens,
            **figures,
            "wall_seconds": time.perf_counter() - started,
        },
    )
    return StepResult(artifact, made=True, figures=figures)


def stages_of(config: TrainConfig, stages: Sequence[Stage]) -> list[StageRow]:
    """The stage table under the `train` section."""
    return stage_table(
        stages,
        global_batch_size=config.global_batch_size,
        drop_last=config.drop_last,
        lr=config.lr,
        max_steps=config.max_steps,
    )


def _inputs(chain: Chain) -> dict[str, str]:
    """The artifacts that this one is made from, made first where `upstream=auto` asks for it."""
    inputs = {}
    if chain.config.curriculum.needs_partition:
        inputs["partition"] = obtain(chain.run, "partition", chain.partition_key, chain.store).id
    for part, source in (("student", chain.student), ("teacher", chain.teacher)):
        if source is not None and "student" in source.identity:
            inputs[part] = str(source.identity["student"])
    return inputs


def _subsets(chain: Chain, rows: TrainingRows) -> list[Subset]:
    if not chain.config.curriculum.needs_partition:
        return [Subset(0, rows.train.ids)]
    partition = obtain(chain.run, "partition", chain.partition_key, chain.store)
    subsets = read_partition(chain.store, partition)
    members = {record_id for subset in subsets for record_id in subset.record_ids}
    if members != set(rows.train.ids):
        raise ArtifactError(
            f"the partition holds other rows than the data set ({len(members)} and {len(rows.train)})",
            where=str(partition.path),
            fix=f"delete it and run: {chain.run.command_for('partition')}",
        )
    return subsets


def _student(chain: Chain, loaded: LoadedModel, rows: TrainingRows, hardware: Hardware) -> StudentWithObjective:
    headed = split_model(loaded.model)
    teacher, teacher_tokenizer = None, None
    if chain.config.kd_method.needs_teacher and chain.teacher is not None:
        teacher, teacher_tokenizer = teacher_of(chain, rows.train, hardware), load_tokenizer(chain.teacher)
    alignment = align_vocabularies(
        student_tokenizer=loaded.tokenizer,
        student_width=headed.num_logits,
        teacher_tokenizer=teacher_tokenizer,
        teacher_width=teacher.num_logits if teacher else None,
    )
    if chain.config.student.gradient_checkpointing:
        recompute_layers(loaded.model)
    return StudentWithObjective(
        headed,
        method=chain.config.kd_method,
        teacher=teacher,
        num_real_tokens=alignment.num_real_tokens,
        hardware=hardware,
    )


def _teacher_source(student: StudentWithObjective) -> str | None:
    """What a checkpoint notes of the teacher: its two sources give other bytes, as they pad rows otherwise."""
    if student.teacher is None:
        return None
    return "stored" if isinstance(student.teacher, StoredTeacher) else "online"


def _job(
    config: PoclConfig,
    student: StudentWithObjective,
    loaded: LoadedModel,
    rows: TrainingRows,
    stages: Sequence[Stage],
    table: Sequence[StageRow],
    folder: Path,
    hardware: Hardware,
    track: Callable[[Mapping[str, Any], int], None],
    show: Advance,
) -> TrainingJob:
    train_config = config.train
    evaluates = rows.dev is not None and train_config.evaluate_every > 0
    if train_config.checkpoint_policy == "best" and not evaluates:
        get_logger().info("no dev evaluation: every stage hands on its last state (checkpoint_policy=last)")
    settings = LoopSettings(
        **train_config.model_dump(include={"seed", "lr", "lr_end", "weight_decay", "grad_clip", "global_batch_size"}),
        **train_config.model_dump(include={"drop_last", "log_every", "checkpoint_every", "evaluate_every"}),
        keep_best=evaluates and train_config.checkpoint_policy == "best",
        max_tokens_per_micro_batch=hardware.max_tokens_per_micro_batch,
    )

    def evaluate_dev() -> dict[str, float]:
        return _dev_figures(config, student, loaded, rows, hardware)

    return TrainingJob(
        student=student,
        stages=stages,
        table=table,
        rows=rows.train,
        settings=settings,
        folder=folder,
        evaluate_dev=evaluate_dev if evaluates else None,
        track=track,
        show=show,
    )


def _dev_figures(
    config: PoclConfig, student: StudentWithObjective, loaded: LoadedModel, rows: TrainingRows, hardware: Hardware
) -> dict[str, float]:
    """Cross entropy and, by generation, ROUGE-L on the dev rows."""
    assert rows.dev is not None, "no dev rows"
    dev = [rows.dev.row(record_id) for record_id in rows.dev.ids]
    measured, (answers,) = measure_and_answer(
        student.headed,
        loaded,
        dev,
        decoding=config.train.dev_decoding,
        seeds=[config.train.seed],
        purpose="dev",
        hardware=hardware,
    )
    num_tokens = sum(row.num_response_tokens for row in measured)
    scores = [rouge_l(one.text, rows.records[row.id].references) for row, one in zip(dev, answers, strict=True)]
    return {
        "dev_cross_entropy": math.fsum(row.cross_entropy * row.num_response_tokens for row in measured) / num_tokens,
        "dev_rouge_l": 100 * math.fsum(scores) / len(scores),
        "dev_response_tokens": sum(one.num_tokens for one in answers) / len(answers),
        "dev_ended_with_eos": 100 * sum(one.ended for one in answers) / len(answers),
    }


def _kept_dev_figures(folder: Path, keep_best: bool) -> dict[str, float]:
    """The dev figures of the state that is kept: the best of the last stage, or the last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dev = [line for line in lines if "dev_rouge_l" in line]
    if not dev:
        return {}
    kept = dev[-1]
    if keep_best:
        of_stage = [line for line in dev if line["stage"] == kept["stage"] and line["step"] > 0] or [kept]
        kept = max(of_stage, key=lambda line: (line["dev_rouge_l"], -line["dev_cross_entropy"]))
    return {name: kept[name] for name in ("dev_rouge_l", "dev_cross_entropy")}


def _write_model(
    work: Work, chain: Chain, loaded: LoadedModel, table: Sequence[StageRow], figures: Mapping[str, float]
) -> None:
    folder = work.path / "model"
    durable.remove_tree(folder)
    disable_progress_bar()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    durable.write_text(folder / "README.md", model_card(chain.run.resolved, table, figures, chain.run.command))


def _tracker_folder(chain: Chain) -> Path:
    """Local files of a tracker: not a part of the artifact, and kept when the run is interrupted."""
    return chain.store.outputs / "trackers" / chain.student_key.folder_name


def _name_interrupted_neighbours(chain: Chain) -> None:
    key = chain.student_key
    for other in chain.store.interrupted("students", key.slug):
        if other.id != key.id:
            changes = difference(other.identity, key.identity)
            get_logger().info(
                "an interrupted run %s differs in %s; this is another run, from its start", other.id, "; ".join(changes)
            )
