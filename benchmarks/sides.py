"""One optimizer step's forward and backward pass, as five programs do it: the sides that the benchmarks compare.

Each side is a function from a case to a step; a step pads its rows, runs the models, leaves the gradients in the
student and returns the loss `(1 − a)·CE + a·T²·D` per response token, T² where the method says so.

B rows, L positions, N response tokens, V logits of real tokens, D hidden size.
"""

# ruff: noqa: N815 (fields carry shape suffixes too)
from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import stored_states
from pocl_cli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cases import Case
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.head import OutputHead
    from pocl_cli.models.teacher import Teacher
    from pocl_cli.records import TokenisedRow

Step = Callable[[], float]

# The package that a side needs beside this one.
PACKAGES = {"trl": "trl", "liger": "liger_kernel"}
# TRL's and Liger's beta is the teacher's weight in the generalised JSD: beta·KL(p ‖ m) + (1 − beta)·KL(q ‖ m) with
# m = beta·p + (1 − beta)·q, p teacher, q student. At the ends, where that is 0, they put KL(p ‖ q) at 0 and KL(q ‖ p)
# at 1. Ours calls it `teacher_weight` and keeps 0 at the ends.
BETAS = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}
IGNORED = -100


def missing_package(side: str) -> str | None:
    """The package that `side` needs and that is not installed."""
    package = PACKAGES.get(side)
    return package if package is not None and importlib.util.find_spec(package) is None else None


# ── the reference formulation ─────────────────────────────────────────────────────────────────────────────────────────


class Padded(NamedTuple):
    """Rows padded on the right. `targets_BL` holds what each position predicts, `IGNORED` outside of responses."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    targets_BL: Tensor

    def logits(self, model: PreTrainedModel, num_real_tokens: int) -> Tensor:
        """The logits of every position `[B, L, V]`."""
        outputs = model(input_ids=self.input_ids_BL, attention_mask=self.attention_mask_BL, use_cache=False)
        logits_BLV: Tensor = outputs.logits[..., :num_real_tokens]
        return logits_BLV


def padded(rows: Sequence[TokenisedRow], length: int, pad_token_id: int) -> Padded:
    """All rows in one batch of `length` positions."""
    import torch

    input_ids_BL = torch.full((len(rows), length), pad_token_id)
    attention_mask_BL = torch.zeros_like(input_ids_BL)
    targets_BL = torch.full_like(input_ids_BL, IGNORED)
    for i, row in enumerate(rows):
        input_ids_BL[i, : row.num_tokens] = torch.tensor([*row.prompt_ids, *row.response_ids])
        attention_mask_BL[i, : row.num_tokens] = 1
        targets_BL[i, len(row.prompt_ids) - 1 : row.num_tokens - 1] = torch.tensor(row.response_ids)
    return Padded(input_ids_BL, attention_mask_BL, targets_BL)


def reference_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Padded,
    *,
    method: Any,
    kd_ratio: float,
    temperature: float,
    num_real_tokens: int,
) -> Tensor:
    """Both models' logits of every position, the loss of all of them, then the mask."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        teacher_BLV = batch.logits(teacher, num_real_tokens)
    student_BLV = batch.logits(student, num_real_tokens)
    ce = F.cross_entropy(student_BLV.flatten(0, 1), batch.targets_BL.flatten(), ignore_index=IGNORED)
    log_p_BLV = F.log_softmax(teacher_BLV / temperature, dim=-1)
    log_q_BLV = F.log_softmax(student_BLV / temperature, dim=-1)
    mask_BL = batch.targets_BL != IGNORED
    kd = (plain_divergence(method, log_p_BLV, log_q_BLV) * mask_BL).sum() / mask_BL.sum()
    return (1 - kd_ratio) * ce + kd_ratio * (temperature**2 if method.t_squared else 1.0) * kd


def plain_divergence(method: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence over the last dimension as it stands on paper, in nats; p teacher, q student, both above zero."""
    if method.name == "jsd":
        weight: float = method.teacher_weight
        log_m = _log_mixture(log_p, log_q, weight)
        return weight * _kl(log_p, log_m) + (1 - weight) * _kl(log_q, log_m)
    others: dict[str, Callable[[], Tensor]] = {
        "fkl": lambda: _kl(log_p, log_q),
        "rkl": lambda: _kl(log_q, log_p),
        "tvd": lambda: (log_p.exp() - log_q.exp()).abs().sum(dim=-1) / 2,
        "sfkl": lambda: _kl(log_p, _log_mixture(log_p, log_q, method.alpha)),
        "srkl": lambda: _kl(log_q, _log_mixture(log_q, log_p, method.alpha)),
    }
    return others[method.name]()


def _kl(log_p: Tensor, log_r: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_r)).sum(dim=-1)


def _log_mixture(log_p: Tensor, log_r: Tensor, weight: float) -> Tensor:
    return (weight * log_p.exp() + (1 - weight) * log_r.exp()).log()


def reference_side(case: Case) -> Step:
    """All rows padded to one length, full logits of both models; the teacher runs at every step."""
    teacher = case.load_teacher().model

    def step() -> float:
        batch = padded(case.rows, case.padded_length, case.student.pad_token_id)
        loss = reference_loss(
            case.student.model,
            teacher,
            batch,
            method=case.method,
            kd_ratio=case.kd_ratio,
            temperature=case.temperature,
            num_real_tokens=case.num_real_tokens,
        )
        loss.backward()
        return loss.item()

    return step


# ── other libraries ───────────────────────────────────────────────────────────────────────────────────────────────────


def trl_side(case: Case) -> Step:
    """The loss of TRL's GKD trainer on full logits; the batch is padded to its longest row, the teacher runs.

    TRL divides the sum by the number of response tokens, as ours does, has no cross entropy and no T²: the factor is
    put on here, so that losses and gradients compare.
    """
    import torch

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # a warning in every process else
    from trl.experimental.gkd import GKDTrainer

    assert case.kd_ratio == 1, "TRL's loss has no cross entropy"
    teacher, factor = case.load_teacher().model, _distillation_weight(case)

    def step() -> float:
        batch = _padded_to_longest(case)
        student_BLV = batch.logits(case.student.model, case.num_real_tokens)
        with torch.no_grad():
            teacher_BLV = batch.logits(teacher, case.num_real_tokens)
        # The trainer cuts off the last position and shifts the labels, which is what `targets_BL` holds already.
        loss: Tensor = factor * GKDTrainer.generalized_jsd_loss(
            student_BLV[:, :-1],
            teacher_BLV[:, :-1],
            batch.targets_BL[:, :-1],
            beta=BETAS[case.method.name],
            temperature=case.temperature,
        )
        loss.backward()
        return loss.item()

    return step


def liger_side(case: Case) -> Step:
    """Liger's chunked loss on the hidden states of every position; padded to the longest row, the teacher runs.

    Its soft term has no T²: the factor is in its weight.
    """
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from pocl_cli.models.batch import PaddedRows
    from pocl_cli.models.head import split_model

    teacher, student = split_model(case.load_teacher().model.requires_grad_(False)), split_model(case.student.model)
    teacher_weight_VE = _head_weight(teacher.head)[: case.num_real_tokens]
    objective = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - case.kd_ratio,
        weight_soft_loss=_distillation_weight(case),
        beta=BETAS[case.method.name],
        temperature=case.temperature,
        compiled=case.setup.compiled and has_compiler(),
    )

    def step() -> float:
        batch = _padded_to_longest(case)
        # Liger takes every position.
        every = PaddedRows(batch.input_ids_BL, torch.arange(batch.input_ids_BL.numel()))
        with torch.no_grad():
            teacher_NE = teacher.padded_hidden_states(every)
        # The cut is a part of every step's graph: the gradient goes through it to the whole weight.
        student_weight_VD = _head_weight(student.head)[: case.num_real_tokens]
        student_ND = student.padded_hidden_states(every)
        loss: Tensor = objective(
            student_ND, student_weight_VD, teacher_NE, teacher_weight_VE, batch.targets_BL.flatten()
        )
        loss.backward()
        return loss.item()

    return step


def has_compiler() -> bool:
    """Whether `torch.compile` finds the C++ compiler that it uses on a CPU."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def _padded_to_longest(case: Case) -> Padded:
    return padded(case.rows, max(row.num_tokens for row in case.rows), case.student.pad_token_id)


def _distillation_weight(case: Case) -> float:
    weight: float = case.kd_ratio * (case.temperature**2 if case.method.t_squared else 1.0)
    return weight


def _head_weight(head: OutputHead) -> nn.Parameter:
    """The one matrix of a head that is nothing else, `[rows, D]`."""
    from torch import nn

    plain = (head.multiplier, head.divisor, head.soft_cap) == (1, 1, None)
    if not (plain and isinstance(head.projection, nn.Linear) and head.projection.bias is None):
        why, fix = "Liger's loss takes a matrix", "measure another model, or leave --sides liger out"
        raise ConfigError("an output head that is more than a matrix", where="side liger", why=why, fix=fix)
    return head.projection.weight


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def online_side(case: Case) -> Step:
    """What the training loop makes of a global batch; the teacher runs at every step."""
    from pocl_cli.models.head import split_model
    from pocl_cli.models.teacher import OnlineTeacher

    return _ours(case, lambda hardware: OnlineTeacher(split_model(case.load_teacher().model)))


def stored_side(case: Case) -> Step:
    """What the training loop makes of a global batch, with the teacher's hidden states read instead of computed."""
    store = case.store
    assert store is not None, "the stored side is given a folder of hidden states"
    return _ours(case, lambda hardware: stored_states.stored_teacher(case, store, hardware))


def _ours(case: Case, open_teacher: Callable[[Hardware], Teacher]) -> Step:
    from cases import shipped
    from pocl_cli.models.device import set_up_hardware
    from pocl_cli.models.head import split_model
    from pocl_cli.schema import HardwareConfig
    from pocl_cli.training.objective import collate
    from pocl_cli.training.sampler import micro_batches
    from pocl_cli.training.student import StudentWithObjective

    changed = {"max_tokens_per_micro_batch": case.setup.max_tokens_per_micro_batch}
    hardware = set_up_hardware(HardwareConfig(**{**shipped("hardware/cpu"), **changed}))
    module = StudentWithObjective(
        split_model(case.student.model),
        method=case.method,
        teacher=open_teacher(hardware),
        num_real_tokens=case.num_real_tokens,
        hardware=hardware,
    )

    def step() -> float:
        total = 0.0
        for group in micro_batches(case.rows, hardware.max_tokens_per_micro_batch, packs=module.packs):
            output = module(
                collate(group),
                temperature=case.temperature,
                kd_ratio=case.kd_ratio,
                normaliser=case.num_response_tokens,
            )
            output.loss.backward()
            total += output.loss.item()
        return total

    return step


SIDES: dict[str, Callable[[Case], Step]] = {
    "reference": reference_side,
    "trl": trl_side,
    "liger": liger_side,
    "online": online_side,
    "stored": stored_side,
}
