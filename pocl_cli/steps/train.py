"""Training inside a process: from a chain whose inputs exist to the student's files in the work folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from transformers.utils.logging import disable_progress_bar

from pocl_cli import tables
from pocl_cli.artifacts import durable
from pocl_cli.curriculum.audit import StageAudit, audit, steps_made
from pocl_cli.curriculum.selecting import selecting
from pocl_cli.curriculum.stage_table import StageRow, table_as_made
from pocl_cli.errors import ArtifactError
from pocl_cli.log import get_logger, progress
from pocl_cli.models.attention import recompute_layers
from pocl_cli.models.card import model_card
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.models.head import split_model
from pocl_cli.models.load import LoadedModel, load_model, load_tokenizer
from pocl_cli.models.lora import Adapters
from pocl_cli.models.vocabulary import align_vocabularies
from pocl_cli.records import Stage, Subset, answers_of, generates
from pocl_cli.schema import PoclConfig
from pocl_cli.seeds import derive_seed
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.chosen_rows import as_chosen
from pocl_cli.steps.dev import dev_figures, kept_dev_figures
from pocl_cli.steps.partition import read_partition
from pocl_cli.steps.result import obtain
from pocl_cli.steps.rows import TrainingRows, training_rows
from pocl_cli.steps.stage_teachers import StageTeachers, tell_savings
from pocl_cli.steps.stages import stages_of, with_teachers
from pocl_cli.steps.stored_answers import read_answers
from pocl_cli.steps.teacher import teacher_of, teacher_source
from pocl_cli.steps.weights import loadable
from pocl_cli.training import checkpoint
from pocl_cli.training.answered_rows import Together
from pocl_cli.training.loop import LoopSettings, TrainingJob, train
from pocl_cli.training.parallel import Processes
from pocl_cli.training.replay import Replay
from pocl_cli.training.rollout import Rollout
from pocl_cli.training.shards import Rows
from pocl_cli.training.stage_rows import RowChoice, measure_rows
from pocl_cli.training.student import StudentWithObjective


class Trained(NamedTuple):
    """Optimizer steps, response tokens that were trained on, the dev figures of the state that is kept, and the audit.

    `audit` says what each stage consumed; empty in the processes that write nothing.
    """

    num_steps: int
    num_tokens: int
    figures: dict[str, float]
    audit: list[StageAudit]


def train_student(chain: Chain, folder: Path, processes: Processes) -> dict[str, Any]:
    """Trains the student of a chain and leaves its files in `folder`; where several processes train, all call this.

    Args:
        chain: its student has no artifact yet, everything upstream has.
        folder: the work folder, where an interrupted run has left its checkpoints.
        processes: those that train together.

    Returns:
        The fields of `Trained`.

    Raises:
        PoclError: the run cannot begin, or fails.
        Interrupted: SIGTERM or SIGINT came; a checkpoint of the last whole step was written.
    """
    config = chain.config
    hardware = set_up_hardware(config.hardware, rank=processes.local_rank)

    # ── rows and stages ───────────────────────────────────────────────────────────────────────────────────────────
    tokenizer = load_tokenizer(chain.student)
    rows = training_rows(config, tokenizer)
    answers = {who: read_answers(chain, who, rows.train, tokenizer) for who in answers_of(config.kd_method)}
    subsets = _subsets(chain, rows)
    stages = config.curriculum(subsets)
    table = with_teachers(chain, stages_of(config.train, stages))
    if processes.is_first:
        durable.write_json(folder / "stages.json", table)
        tables.stage_table(table)

    # ── models ────────────────────────────────────────────────────────────────────────────────────────────────────
    loaded = load_model(
        loadable(chain, chain.student),
        device=hardware.device,
        dtype_override=torch.float32,
        dropout=config.student.dropout,
    )
    adapters = None
    if config.student.lora.rank:
        adapters = Adapters(loaded.model, config.student.lora, derive_seed(config.train.seed, "lora"))
    asked: Rows = Together(answers) if answers else rows.train
    student = _student(chain, loaded, asked, hardware)
    checkpoints = folder / "checkpoints" if processes.is_first else None
    teachers = None
    if chain.lessons:
        teachers = StageTeachers(chain, loaded, student.headed.num_logits, asked, hardware, checkpoints)
    elif checkpoints is not None:
        checkpoint.refuse_other_teacher(checkpoints, teacher_source(student.teacher))

    # ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────
    job = _job(config, student, loaded, rows, stages, table, folder, hardware, processes)
    job = replace(job, answers=answers, change_teacher=teachers.begin if teachers else None)
    with ExitStack() as stack:
        if processes.is_first:
            slug = chain.student_key.slug
            tracker = stack.enter_context(config.tracker.open(_tracker_folder(chain), slug, dict(chain.run.resolved)))
            show = stack.enter_context(progress(slug, sum(row["steps"] for row in table)))
            job = replace(job, track=tracker.log, show=show)
        with memory_errors_explained(hardware, "training"):
            state = train(job)
    tell_savings(student.teacher)

    # ── check what was trained on, and write ──────────────────────────────────────────────────────────────────────
    figures, consumed = kept_dev_figures(folder, job.settings.keep_best), []
    if processes.is_first:
        drawn = pq.read_table(folder / "consumed.parquet")
        batch_size, drop_last = config.train.global_batch_size, config.train.drop_last
        num_steps = steps_made(drawn)
        table = table_as_made(stages, table, num_steps, global_batch_size=batch_size, drop_last=drop_last)
        if job.choice is not None:
            stages, table = as_chosen(folder, job.choice, stages, table)
        durable.write_json(folder / "stages.json", table)
        consumed = audit(drawn, stages, table, subsets, global_batch_size=batch_size, drop_last=drop_last)
        _write_model(folder, chain, loaded, adapters, table, figures)
    processes.barrier()
    return Trained(state.step, state.num_tokens, figures, consumed)._asdict()


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


def _student(chain: Chain, loaded: LoadedModel, rows: Rows, hardware: Hardware) -> StudentWithObjective:
    """The student with its teacher, which is asked for `rows`; without one where each stage will bring its own."""
    headed = split_model(loaded.model)
    teacher, teacher_tokenizer = None, None
    if chain.config.kd_method.needs_teacher and chain.teacher is not None and not chain.lessons:
        if chain.config.teacher.store and not chain.stores_teacher:
            get_logger().info("the teacher runs in every step: what the student has just written is not stored")
        teacher, teacher_tokenizer = (
            teacher_of(chain, rows, hardware, stored=chain.stores_teacher),
            load_tokenizer(chain.teacher),
        )
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


def _job(
    config: PoclConfig,
    student: StudentWithObjective,
    loaded: LoadedModel,
    rows: TrainingRows,
    stages: Sequence[Stage],
    table: Sequence[StageRow],
    folder: Path,
    hardware: Hardware,
    processes: Processes,
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

    def evaluate_dev(stage: int) -> dict[str, float]:
        return dev_figures(config, student, loaded, rows, hardware, processes, stage)

    scheduler = selecting(config.curriculum)
    measure = partial(measure_rows, student, rows.train, hardware=hardware, processes=processes)
    return TrainingJob(
        student=student,
        stages=stages,
        table=table,
        rows=rows.train,
        settings=settings,
        folder=folder,
        evaluate_dev=evaluate_dev if evaluates else None,
        rollout=_rollout(config, loaded) if generates(config.kd_method) else None,
        replay=_replay(config, loaded, rows) if generates(config.kd_method) else None,
        processes=processes,
        choice=RowChoice(scheduler, rows.train.ids, measure) if scheduler else None,
    )


def _rollout(config: PoclConfig, loaded: LoadedModel) -> Rollout:
    return Rollout(
        decoding=config.kd_method.decoding,
        seed=config.train.seed,
        eos_token_ids=loaded.eos_token_ids,
        pad_token_id=loaded.pad_token_id,
        max_tokens=config.dataset.max_tokens,
        teacher_mix=getattr(config.kd_method, "teacher_mix", 0.0),
    )


def _replay(config: PoclConfig, loaded: LoadedModel, rows: TrainingRows) -> Replay | None:
    """None for a method that uses each of the student's answers once."""
    size = getattr(config.kd_method, "buffer_size", None)
    if size is None:
        return None
    return Replay(rows.train, size=size, seed=config.train.seed, eos_token_ids=loaded.eos_token_ids)


def _write_model(
    folder: Path,
    chain: Chain,
    loaded: LoadedModel,
    adapters: Adapters | None,
    table: Sequence[StageRow],
    figures: Mapping[str, float],
) -> None:
    if adapters is not None:
        adapters.write(folder / "adapter")
        adapters.merge()
    target = folder / "model"
    durable.remove_tree(target)
    disable_progress_bar()
    loaded.model.save_pretrained(target)
    loaded.tokenizer.save_pretrained(target)
    durable.write_text(target / "README.md", model_card(chain.run.resolved, table, figures, chain.run.command))


def _tracker_folder(chain: Chain) -> Path:
    """Local files of a tracker: not a part of the artifact, and kept when the run is interrupted."""
    return chain.store.outputs / "trackers" / chain.student_key.folder_name
