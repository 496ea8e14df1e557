"""The training loop: stages, epochs, steps, from top to bottom.

Everything that decides a number is a pure function of the configuration and the step, so the state of a run is the
model, the optimizer's moments and a few counts (`state.py`): an interrupted run that resumes gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from pocl_cli.curriculum.learning_rate import learning_rates
from pocl_cli.curriculum.stage_table import StageRow, stage_steps
from pocl_cli.errors import Interrupted
from pocl_cli.log import Advance, get_logger
from pocl_cli.losses.evolving import MethodState, after_dev, after_step, for_step, shown
from pocl_cli.losses.on_policy import rows_for_step
from pocl_cli.records import Stage
from pocl_cli.seeds import derive_seed
from pocl_cli.training import checkpoint
from pocl_cli.training.finite import FiniteGuard
from pocl_cli.training.journal import Journal, SilentJournal, Waited
from pocl_cli.training.optimizer import make_optimizer
from pocl_cli.training.parallel import ALONE, Processes
from pocl_cli.training.replica import Replica
from pocl_cli.training.sampler import Sampler
from pocl_cli.training.signals import Signals
from pocl_cli.training.stage_rows import Measured, RowChoice
from pocl_cli.training.state import Best, TrainingState
from pocl_cli.training.step import Rows, accumulate, of_rollout, rows_of_step

if TYPE_CHECKING:
    from pocl_cli.models.teacher import Teacher
    from pocl_cli.training.replay import Replay
    from pocl_cli.training.rollout import Rollout
    from pocl_cli.training.student import StudentWithObjective


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of `train.*` and `hardware.*` that the loop reads."""

    seed: int
    lr: float
    lr_end: float
    weight_decay: float
    grad_clip: float
    global_batch_size: int
    drop_last: bool
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    keep_best: bool
    max_tokens_per_micro_batch: int


Teach: TypeAlias = "Callable[[Teacher | None], None]"


@dataclass
class TrainingJob:
    """Everything that one run needs. `evaluate_dev` gives the dev figures (`dev_*`) of the student as it stands.

    It is told the stage's index: the stages may be measured on different numbers of rows. `rollout` is there for a KD
    method whose student writes rows of its steps, `answers` (by model) for one that trains on stored answers, `replay`
    for one that uses the student's answers again. `choice`, where there is one, says at the beginning of a stage which
    rows it has. `change_teacher`, where the stages have different teachers, is told the stage's index and hands over
    its teacher, where it is another one.

    Where several processes train together, each has a job of its own; only the first one's writes files and tracks.
    """

    student: StudentWithObjective
    stages: Sequence[Stage]
    table: Sequence[StageRow]
    rows: Rows
    settings: LoopSettings
    folder: Path
    evaluate_dev: Callable[[int], dict[str, float]] | None
    rollout: Rollout | None = None
    answers: Mapping[str, Rows] = field(default_factory=dict)
    replay: Replay | None = None
    track: Callable[[Mapping[str, Any], int], None] = field(default=lambda values, step: None)
    show: Advance = field(default=lambda n, note="": None)
    processes: Processes = ALONE
    choice: RowChoice | None = None
    change_teacher: Callable[[int, Teach], None] | None = None


def train(job: TrainingJob) -> TrainingState:
    """Trains through all stages of `job.table`, from the newest checkpoint where there is one.

    The student ends as the model that is to be kept. Returns the final state.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the step is not made.
        Interrupted: SIGTERM or SIGINT came; a checkpoint of the last whole step was written.
        ArtifactError: every checkpoint is damaged, or was made under other conditions.
        WorkerError: another of the processes is gone or does not answer.
    """
    settings, student, processes = job.settings, job.student, job.processes
    checkpoints = _checkpoints(job)

    # ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────
    found = checkpoint.load_newest(checkpoints, student.backbone, processes)
    state, resumed_from = found if found else (TrainingState(), None)
    method_state = checkpoint.load_method_state(resumed_from, student.backbone) if resumed_from else {}
    measured = checkpoint.load_measured(resumed_from) if resumed_from else {}
    processes.agree_on("the checkpoint to go on from (step, stage)", state.step, state.stage)
    replica = processes.replica(student)
    journal = Journal(job.folder, state, track=job.track) if processes.is_first else SilentJournal()
    if resumed_from:
        get_logger().info("resuming after step %d (stage %d)", state.step, state.stage)
        job.show(state.step)
    elif job.evaluate_dev is not None:
        with replica.whole():
            figures = job.evaluate_dev(0)
            journal.dev_line(figures, step=0, stage=0, epoch=0)
        method_state = after_dev(student.method, figures, method_state)

    rates = learning_rates(job.stages, _schedule_steps(job), start=settings.lr, end=settings.lr_end)
    saved, optimizer, guard = state, None, None
    num_steps = sum(row["steps"] for row in job.table)
    signals = processes.signals()
    try:
        left = slice(state.stage, None)
        for row, stage, rate in zip(job.table[left], job.stages[left], rates[left], strict=True):
            if row["steps"] == 0:
                continue

            # ── a stage: weights carried over, and optimizer and learning-rate schedule where it keeps them ───────
            if job.change_teacher is not None:
                job.change_teacher(stage.index, replica.teach)
            if job.choice is not None:
                with replica.whole(), signals.at_once():
                    measured = job.choice.begin(stage, measured)
                stage = job.choice.stage(stage, measured)
            sampler = Sampler(
                stage,
                seed=settings.seed,
                global_batch_size=settings.global_batch_size,
                drop_last=settings.drop_last,
            )
            if optimizer is None or stage.restart_optimizer:
                optimizer = make_optimizer(student, lr=settings.lr, weight_decay=settings.weight_decay)
            if resumed_from and (state.stage_step or _keeps_optimizer(job, state.stage)):
                checkpoint.load_optimizer(resumed_from, optimizer, student.backbone, replica.part)
            if not state.stage_step:
                get_logger().info(
                    "stage %d: %d rows, %d steps, temperature %.4g, kd_ratio %.4g",
                    stage.index, row["num_rows"], row["steps"], stage.temperature, stage.kd_ratio,
                )  # fmt: skip
            guard = FiniteGuard(stage, sampler, optimizer, first_step=state.step - state.stage_step + 1)
            if state.dev_due:
                state, method_state = _evaluate_dev(job, replica, journal, state, method_state, stage, sampler, signals)

            before = sum(one["steps"] for one in job.table[: state.stage])
            waited = Waited(state)
            for stage_step in range(state.stage_step, row["steps"]):
                if state.converged:
                    get_logger().info("stage %d has converged after %d steps", stage.index, stage_step)
                    job.show(row["steps"] - stage_step)
                    break

                # ── one optimizer step, without waiting for the device ────────────────────────────────────────────
                lr = rate.at(stage_step)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                record_ids = sampler.global_batch(stage_step)
                gold = [job.rows.row(record_id) for record_id in record_ids]
                replica.module.train()
                optimizer.zero_grad(set_to_none=True)
                progress = (before + stage_step) / num_steps
                method = for_step(student.method, progress, method_state)
                asked = rows_for_step(student.method, settings.seed, state.step, progress, method_state, stage.kd_ratio)
                with signals.at_once():
                    drawn = partial(job.replay.draw, method_state, step=state.step) if job.replay else None
                    parts = rows_of_step(asked, gold, state.step, replica, job.rollout, job.answers, drawn)
                    torch.manual_seed(derive_seed(settings.seed, "dropout", state.step, *processes.stream))
                    loss, ce, kd = accumulate(
                        parts,
                        replica,
                        method=method,
                        temperature=stage.temperature,
                        max_tokens=settings.max_tokens_per_micro_batch,
                    )
                grad_norm = replica.clip_gradients(settings.grad_clip)
                guard.step(stage_step, loss, grad_norm)

                num_tokens = state.num_tokens + sum(one.num_tokens for one in parts)
                state = replace(state, step=state.step + 1, stage_step=stage_step + 1, num_tokens=num_tokens)
                if job.replay is not None:
                    method_state = job.replay.after(method_state, parts)
                method_state = after_step(student.method, (before + stage_step + 1) / num_steps, method_state, kd)

                # ── log ───────────────────────────────────────────────────────────────────────────────────────────
                epoch, last = sampler.epoch(stage_step), stage_step + 1 == row["steps"]
                journal.consumed(record_ids, stage=stage.index, epoch=epoch, step=state.step)
                if state.step == 1 or last or state.step % settings.log_every == 0:
                    guard.refuse()
                    journal.train_line(
                        {
                            "step": state.step,
                            "stage": stage.index,
                            "epoch": epoch,
                            "loss": float(loss),
                            "ce": float(ce),
                            "kd": float(kd),
                            "grad_norm": float(grad_norm),
                            "lr": lr,
                            "temperature": stage.temperature,
                            "kd_ratio": stage.kd_ratio,
                            "num_tokens": state.num_tokens,
                            **(of_rollout(parts) if job.rollout is not None else {}),
                            **shown(student.method, method_state),
                        },
                        pace=waited.pace(state),
                    )
                    waited = Waited(state, note=f"{waited.pace(state).tokens_per_second:,.0f} response tokens/s")
                job.show(1, waited.note)

                # ── dev evaluation at the end of an epoch and of the stage ────────────────────────────────────────
                epoch_ends = (stage_step + 1) % sampler.steps_per_epoch == 0 or last
                due = settings.evaluate_every and ((epoch + 1) % settings.evaluate_every == 0 or last)
                if job.evaluate_dev is not None and epoch_ends and due:
                    guard.refuse()
                    state = replace(state, dev_due=True)
                    state, method_state = _evaluate_dev(
                        job, replica, journal, state, method_state, stage, sampler, signals
                    )
                    waited = Waited(state, note=waited.note)

                # ── checkpoint ────────────────────────────────────────────────────────────────────────────────────
                if not last and state.step % settings.checkpoint_every == 0:
                    guard.refuse()
                    state = saved = _save(job, replica, journal, state, method_state, optimizer, measured)
                    waited = Waited(state, note=waited.note)

            # ── the stage ends: its best or last state is handed on ───────────────────────────────────────────────
            if settings.keep_best and state.best is not None:
                with replica.whole(changes=True):
                    checkpoint.load_best(checkpoints, state.best, student.backbone)
                processes.barrier()  # the next checkpoint removes what has now been read
            state = state.next_stage()
            kept = optimizer if _keeps_optimizer(job, state.stage) else None
            state = saved = _save(job, replica, journal, state, method_state, kept, measured)
            resumed_from = None
        if signals.pending is not None:
            raise signals.pending
    except Interrupted:
        # The step or the evaluation under way is given up and made again; what was done before it is kept.
        if state != saved:
            if guard is not None:
                guard.refuse()
            _save(job, replica, journal, state, method_state, optimizer, measured)
        raise
    finally:
        signals.release()
    journal.close()
    replica.make_whole()
    return state


def _schedule_steps(job: TrainingJob) -> list[int]:
    """Length of every stage for its learning rate: a stop inside several stages (max_steps) does not shorten it."""
    if len(job.table) == 1:
        return [job.table[0]["steps"]]
    settings = job.settings
    return [
        stage_steps(stage, global_batch_size=settings.global_batch_size, drop_last=settings.drop_last)
        for stage in job.stages
    ]


def _keeps_optimizer(job: TrainingJob, index: int) -> bool:
    """Whether the stage `index` goes on with the moments of the one before."""
    return 0 < index < len(job.stages) and not job.stages[index].restart_optimizer


def _evaluate_dev(
    job: TrainingJob,
    replica: Replica,
    journal: Journal,
    state: TrainingState,
    method_state: MethodState,
    stage: Stage,
    sampler: Sampler,
    signals: Signals,
) -> tuple[TrainingState, MethodState]:
    """Evaluates the student on the dev rows; saves it where it beats the stage's best so far."""
    assert job.evaluate_dev is not None, "an evaluation is due only where there is one"
    with replica.whole():
        with signals.at_once():
            figures = job.evaluate_dev(stage.index)
        epoch = sampler.epoch(state.stage_step - 1) + 1
        journal.dev_line(figures, step=state.step, stage=stage.index, epoch=epoch)
        state = replace(state, dev_due=False).after(figures, stage.convergence, epoch)
        method_state = after_dev(job.student.method, figures, method_state)
        if not job.settings.keep_best or (state.best is not None and not state.best.is_beaten_by(figures)):
            return state, method_state
        written = (
            checkpoint.save_best(_checkpoints(job), state.step, job.student.backbone) if job.processes.is_first else ""
        )
    job.processes.barrier()
    sha256 = written or checkpoint.best_sha256(_checkpoints(job), state.step)
    best = Best(state.step, figures.get("dev_rouge_l"), figures["dev_cross_entropy"], sha256)
    return replace(state, best=best), method_state


def _save(
    job: TrainingJob,
    replica: Replica,
    journal: Journal,
    state: TrainingState,
    method_state: MethodState,
    optimizer: torch.optim.Optimizer | None,
    measured: Measured,
) -> TrainingState:
    """Makes all lines durable, then the checkpoint that counts them; the state as it was saved."""
    state = replace(state, metrics_bytes=journal.flush(state.step))
    with replica.whole(optimizer):
        if job.processes.is_first:
            checkpoint.save(
                _checkpoints(job),
                state,
                job.student.backbone,
                optimizer,
                method_state,
                measured,
                processes=job.processes,
            )
    return state


def _checkpoints(job: TrainingJob) -> Path:
    return job.folder / "checkpoints"
