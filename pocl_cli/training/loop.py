"""The training loop: stages, epochs, steps, from top to bottom.

Everything that decides a number is a pure function of the configuration and the step, so the state of a run is the
model, the optimizer's moments and a few counts (`state.py`): an interrupted run that resumes gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pocl_cli.curriculum.learning_rate import learning_rates
from pocl_cli.curriculum.stage_table import StageRow, stage_steps
from pocl_cli.errors import Interrupted
from pocl_cli.log import Advance, get_logger
from pocl_cli.losses.evolving import MethodState, after_step, for_step
from pocl_cli.records import Stage, TokenisedRow
from pocl_cli.seeds import derive_seed
from pocl_cli.training import checkpoint
from pocl_cli.training.finite import FiniteGuard
from pocl_cli.training.journal import Journal, Pace, SilentJournal
from pocl_cli.training.objective import collate
from pocl_cli.training.optimizer import make_optimizer
from pocl_cli.training.parallel import ALONE, Processes
from pocl_cli.training.replica import Replica
from pocl_cli.training.sampler import Sampler, micro_batches
from pocl_cli.training.signals import Signals
from pocl_cli.training.stage_rows import Measured, RowChoice
from pocl_cli.training.state import Best, TrainingState

if TYPE_CHECKING:
    from pocl_cli.losses.divergence import KDMethod
    from pocl_cli.training.student import StudentWithObjective


class Rows(Protocol):
    """Tokenised training rows by record id."""

    def row(self, record_id: str) -> TokenisedRow: ...


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


@dataclass
class TrainingJob:
    """Everything that one run needs. `evaluate_dev` gives the dev figures (`dev_*`) of the student as it stands.

    It is told the stage's index: the stages may be measured on different numbers of rows. `choice`, where there is one,
    says at the beginning of a stage which rows it has.

    Where several processes train together, each has a job of its own; only the first one's writes files and tracks.
    """

    student: StudentWithObjective
    stages: Sequence[Stage]
    table: Sequence[StageRow]
    rows: Rows
    settings: LoopSettings
    folder: Path
    evaluate_dev: Callable[[int], dict[str, float]] | None
    track: Callable[[Mapping[str, Any], int], None] = field(default=lambda values, step: None)
    show: Advance = field(default=lambda n, note="": None)
    processes: Processes = ALONE
    choice: RowChoice | None = None


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
            journal.dev_line(job.evaluate_dev(0), step=0, stage=0, epoch=0)

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
                state = _evaluate_dev(job, replica, journal, state, stage, sampler, signals)

            before = sum(one["steps"] for one in job.table[: state.stage])
            waited = _Waited(state)
            for stage_step in range(state.stage_step, row["steps"]):
                if state.converged:
                    get_logger().info("stage %d has converged after %d steps", stage.index, stage_step)
                    job.show(row["steps"] - stage_step)
                    break

                # ── one optimizer step, without waiting for the device ────────────────────────────────────────────
                torch.manual_seed(derive_seed(settings.seed, "dropout", state.step, *processes.stream))
                lr = rate.at(stage_step)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                record_ids = sampler.global_batch(stage_step)
                rows = [job.rows.row(record_id) for record_id in record_ids]
                num_tokens = sum(len(one.response_ids) for one in rows)
                replica.module.train()
                optimizer.zero_grad(set_to_none=True)
                method = for_step(student.method, (before + stage_step) / num_steps, method_state)
                with signals.at_once():
                    loss, ce, kd = _accumulate(job, replica, rows, stage, method, num_tokens)
                grad_norm = replica.clip_gradients(settings.grad_clip)
                guard.step(stage_step, loss, grad_norm)

                state = replace(
                    state, step=state.step + 1, stage_step=stage_step + 1, num_tokens=state.num_tokens + num_tokens
                )
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
                        },
                        pace=waited.pace(state),
                    )
                    waited = _Waited(state, note=f"{waited.pace(state).tokens_per_second:,.0f} response tokens/s")
                job.show(1, waited.note)

                # ── dev evaluation at the end of an epoch and of the stage ────────────────────────────────────────
                epoch_ends = (stage_step + 1) % sampler.steps_per_epoch == 0 or last
                due = settings.evaluate_every and ((epoch + 1) % settings.evaluate_every == 0 or last)
                if job.evaluate_dev is not None and epoch_ends and due:
                    guard.refuse()
                    state = replace(state, dev_due=True)
                    state = _evaluate_dev(job, replica, journal, state, stage, sampler, signals)
                    waited = _Waited(state, note=waited.note)

                # ── checkpoint ────────────────────────────────────────────────────────────────────────────────────
                if not last and state.step % settings.checkpoint_every == 0:
                    guard.refuse()
                    state = saved = _save(job, replica, journal, state, method_state, optimizer, measured)
                    waited = _Waited(state, note=waited.note)

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


class _Waited:
    """When the host last waited for the device, and in which state; `note` goes beside the progress from then on."""

    def __init__(self, state: TrainingState, note: str = "") -> None:
        self.time, self.state, self.note = time.perf_counter(), state, note

    def pace(self, state: TrainingState) -> Pace:
        seconds = time.perf_counter() - self.time
        return Pace(seconds / (state.step - self.state.step), (state.num_tokens - self.state.num_tokens) / seconds)


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


def _accumulate(
    job: TrainingJob, replica: Replica, rows: Sequence[TokenisedRow], stage: Stage, method: KDMethod, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward and backward over a global batch, each process over its share; loss, CE and KD per response token of it.

    Dividing by the response tokens of the whole batch makes the sum over processes what one process would have had.
    """
    device = job.student.backbone.device
    # MPS has no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.zeros(3, dtype=dtype, device=device)
    split = partial(micro_batches, max_tokens=job.settings.max_tokens_per_micro_batch, packs=job.student.packs)
    for group in replica.micro_batches(rows, split):
        output = replica.add_gradients(
            collate(group),
            temperature=stage.temperature,
            kd_ratio=stage.kd_ratio,
            normaliser=max(num_tokens, 1),
            method=method,
        )
        ce, kd = output.ce_sum / max(num_tokens, 1), output.kd_sum / max(num_tokens, 1)
        totals += torch.stack([output.loss.detach(), ce, kd])
    replica.sum_gradients()
    loss, ce, kd = job.processes.sum(totals)
    return loss, ce, kd


def _evaluate_dev(
    job: TrainingJob,
    replica: Replica,
    journal: Journal,
    state: TrainingState,
    stage: Stage,
    sampler: Sampler,
    signals: Signals,
) -> TrainingState:
    """Evaluates the student on the dev rows; saves it where it beats the stage's best so far."""
    assert job.evaluate_dev is not None, "an evaluation is due only where there is one"
    with replica.whole():
        with signals.at_once():
            figures = job.evaluate_dev(stage.index)
        epoch = sampler.epoch(state.stage_step - 1) + 1
        journal.dev_line(figures, step=state.step, stage=stage.index, epoch=epoch)
        state = replace(state, dev_due=False).after(figures, stage.convergence, epoch)
        if not job.settings.keep_best or (state.best is not None and not state.best.is_beaten_by(figures)):
            return state
        written = (
            checkpoint.save_best(_checkpoints(job), state.step, job.student.backbone) if job.processes.is_first else ""
        )
    job.processes.barrier()
    sha256 = written or checkpoint.best_sha256(_checkpoints(job), state.step)
    return replace(state, best=Best(state.step, figures.get("dev_rouge_l"), figures["dev_cross_entropy"], sha256))


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
