"""What an optimizer step is made of, and the loss and gradients of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pocl_cli.losses.on_policy import Part
from pocl_cli.records import TokenisedRow
from pocl_cli.training.objective import collate
from pocl_cli.training.sampler import micro_batches

if TYPE_CHECKING:
    from pocl_cli.losses.divergence import KDMethod
    from pocl_cli.training.replica import Replica
    from pocl_cli.training.rollout import Rollout


@dataclass(frozen=True)
class PartRows:
    """A part of a step's loss and its rows."""

    part: Part
    rows: Sequence[TokenisedRow]

    @property
    def num_tokens(self) -> int:
        """Its response tokens."""
        return sum(len(row.response_ids) for row in self.rows)


class Rows(Protocol):
    """Tokenised training rows by record id."""

    def row(self, record_id: str) -> TokenisedRow: ...


class StepTerms(NamedTuple):
    """Scalars on the device, over all processes.

    Attributes:
        loss: what was minimised.
        ce: cross entropy per response token of the gold rows; of the generated ones where there are no others, which
            estimates the entropy of the student.
        kd: divergence per response token of the parts that have a distillation term.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def rows_of_step(
    parts: Sequence[Part],
    gold: Sequence[TokenisedRow],
    step: int,
    replica: Replica,
    rollout: Rollout | None,
    answers: Mapping[str, Rows],
    replayed: Callable[[int], list[TokenisedRow]] | None = None,
) -> list[PartRows]:
    """The rows of each part; all processes come here together, and have the same ones afterwards.

    Args:
        parts: those of the step; one of weight 0 is left out.
        gold: the global batch.
        step: number of optimizer steps before it.
        replica: of the student.
        rollout: writes answers; None where no part asks for any.
        answers: the stored ones, by the model that gave them.
        replayed: draws so many answers of earlier steps.
    """
    counted = [part for part in parts if part.weight]
    stored = {who: of_model for who, of_model in answers.items() if any(part.rows == who for part in counted)}
    rows = {"gold": gold, **{who: [of_model.row(row.id) for row in gold] for who, of_model in stored.items()}}
    if any(part.rows == "generated" for part in counted):
        assert rollout is not None, "the method says that it generates nothing"
        teacher = replica.student.teacher
        assert teacher is None or teacher.backbone is not None, "what is stored of the teacher are gold rows"
        rows["generated"] = rollout.rows(gold, step, replica)
    if any(part.rows == "replayed" for part in counted):
        assert replayed is not None, "the method says that it generates nothing"
        rows["replayed"] = replayed(len(gold))
    return [PartRows(part, rows[part.rows]) for part in counted]


def accumulate(
    parts: Sequence[PartRows], replica: Replica, *, method: KDMethod, temperature: float, max_tokens: int
) -> StepTerms:
    """Forward and backward over the parts of a step, each process over its share.

    Dividing by the response tokens of a whole part makes the sum over processes what one process would have had.

    Args:
        parts: of the step, one at least.
        replica: of the student.
        method: that of the step.
        temperature: of the stage.
        max_tokens: most tokens of a micro-batch.
    """
    student = replica.student
    device = student.backbone.device
    # MPS has no float64.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.zeros(len(parts), 3, dtype=dtype, device=device)
    split = partial(micro_batches, max_tokens=max_tokens, packs=student.packs)
    for total, of_part in zip(totals, parts, strict=True):
        part, num_tokens = of_part.part, max(of_part.num_tokens, 1)
        for group in replica.micro_batches(of_part.rows, split):
            output = replica.add_gradients(
                collate(group),
                temperature=temperature,
                kd_ratio=part.kd_ratio,
                normaliser=num_tokens / part.weight,
                method=part.method or method,
                sampled=part.rows == "generated",
            )
            ce, kd = output.ce_sum / num_tokens, output.kd_sum / num_tokens
            total += torch.stack([output.loss.detach(), ce, kd])
    replica.sum_gradients()
    losses, ces, kds = replica.processes.sum(totals).unbind(dim=-1)
    gold = [of_part.part.rows == "gold" for of_part in parts]
    distilled = [of_part.part.kd_ratio > 0 for of_part in parts]
    return StepTerms(losses.sum(), _mean(ces, parts, gold), _mean(kds, parts, distilled))


def of_rollout(parts: Sequence[PartRows]) -> dict[str, Any]:
    """What the line of a step says of its generated rows: how many there are, their mean length, their ends in %."""
    rows = [row for of_part in parts if of_part.part.rows == "generated" for row in of_part.rows]
    replayed = sum(len(of_part.rows) for of_part in parts if of_part.part.rows == "replayed")
    if not rows:
        return {"generated_rows": 0, **({"replayed_rows": replayed} if replayed else {})}
    return {
        "generated_rows": len(rows),
        "generated_tokens": sum(len(row.response_ids) for row in rows) / len(rows),
        "generated_ended_with_eos": 100 * sum(not row.response_cut for row in rows) / len(rows),
    }


def _mean(means: Tensor, parts: Sequence[PartRows], counts: Sequence[bool]) -> Tensor:
    """The mean per token over the parts that count; over all of them where none does. `means` has one a part."""
    chosen = [one for one, count in enumerate(counts) if count] or list(range(len(parts)))
    if len(chosen) == 1:
        return means[chosen[0]]
    tokens = [max(parts[one].num_tokens, 1) for one in chosen]
    return torch.stack([means[one] * count for one, count in zip(chosen, tokens, strict=True)]).sum() / sum(tokens)
