"""A teacher whose hidden states are computed once, whichever run, method, stage or seed asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from pocl_cli.errors import NonFiniteError
from pocl_cli.log import get_logger
from pocl_cli.models.head_file import is_plain
from pocl_cli.training.objective import collate
from pocl_cli.training.shards import shard_batches

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.models.batch import Batch
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.head import OutputHead
    from pocl_cli.models.teacher import OnlineTeacher, Teacher
    from pocl_cli.records import TokenisedRow
    from pocl_cli.training.teacher_signals import TeacherSignals


class Tokens(NamedTuple):
    """A number of tokens: of responses, and of prompts and responses together."""

    response: int = 0
    total: int = 0


def open_teacher(signals: TeacherSignals, load: Callable[[], OnlineTeacher], *, hardware: Hardware) -> Teacher:
    """The teacher that reads `signals` and adds what they lack.

    Falls back to the online teacher, with a warning, where the output head cannot be stored. The model is loaded now
    only where no head has been stored yet.
    """
    head, online = signals.head(hardware.device), None
    if head is None:
        online = load()
        if not is_plain(online.head):
            get_logger().warning(
                "the teacher's output head is no plain linear layer and cannot be stored: the teacher runs in every "
                "step, as with teacher.store=false"
            )
            return online
        signals.commit_head(online.head)
        head = signals.head(hardware.device)
        assert head is not None, "the head has just been stored"
    return StoredTeacher(signals, head, load, online, hardware=hardware)


class StoredTeacher:
    """Reads the teacher's hidden states, and keeps only its head in memory.

    A row whose shard is not there is computed with its whole shard and stored; the model is loaded for that, and let go
    when no shard is missing.

    Args:
        signals: what is stored.
        head: the stored head, on the device.
        load: loads the teacher's model.
        online: the teacher, where it is loaded already.
        hardware: device and precision of what is computed.

    Attributes:
        asked: tokens whose hidden states were asked for.
        computed: tokens that this process ran the teacher on.
    """

    def __init__(
        self,
        signals: TeacherSignals,
        head: OutputHead,
        load: Callable[[], OnlineTeacher],
        online: OnlineTeacher | None,
        *,
        hardware: Hardware,
    ) -> None:
        self._signals, self._head, self._load, self._hardware = signals, head, load, hardware
        self._online = online if signals.num_missing else None
        assert isinstance(head.projection, nn.Linear), "only a plain head is stored"
        self._hidden_size = head.projection.in_features
        self.asked, self.computed = Tokens(), Tokens()
        get_logger().info(
            "the teacher's signals: %d of %d shards are stored; a shard is added when one of its rows is first needed",
            signals.num_shards - signals.num_missing,
            signals.num_shards,
        )

    @property
    def head(self) -> OutputHead:
        """Hidden states → logits."""
        return self._head

    @property
    def num_logits(self) -> int:
        """Width of the logits, padding rows included."""
        return self._head.num_logits

    @property
    def packs(self) -> bool:
        """True: what is read from the disk has no padding, and what is computed has batches of its own."""
        return True

    @property
    def backbone(self) -> None:
        """None: missing shards are computed by whichever process needs them, and by no other."""
        return None

    def savings(self) -> str:
        """How many of the tokens that were asked for needed no forward pass, for a log."""
        response, total = (max(0, asked - ran) for asked, ran in zip(self.asked, self.computed, strict=True))
        return f"{total:,} of {self.asked.total:,} ({response:,} of {self.asked.response:,} response tokens)"

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """As `Teacher.hidden_states`.

        Raises:
            ArtifactError: a shard is damaged.
            NonFiniteError: the teacher gives a hidden state that is not finite; it is not stored.
            ResourceError: a shard cannot be written.
        """
        if not batch.num_response_tokens:  # no record: it keeps this process in step with others that have rows left
            return torch.empty(0, self._hidden_size, device=batch.targets_N.device)
        hidden_NE = torch.cat([self._signals.row(row_id, self._compute) for row_id in batch.ids])
        assert len(hidden_NE) == batch.num_response_tokens, "a batch holds whole rows of the store"
        self.asked = Tokens(
            self.asked.response + len(hidden_NE),
            self.asked.total + sum(self._signals.rows.num_tokens(row_id) for row_id in batch.ids),
        )
        if not self._signals.num_missing:
            self._online = None
        return hidden_NE.to(batch.targets_N.device)

    def _compute(self, shard: list[TokenisedRow]) -> Tensor:
        """The hidden states `[N, E]` of a whole shard, in its order, on the CPU."""
        device = self._hardware.device
        # Loading a model draws random numbers, which would change the dropout of the student's step.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self._online is None:
                with torch.autocast(device.type, enabled=False):
                    self._online = self._load()
            parts = []
            for rows in shard_batches(shard):
                with self._hardware.autocast():
                    parts.append(self._online.hidden_states(collate(rows).to(device)).cpu())
                if not torch.isfinite(parts[-1]).all():
                    raise NonFiniteError(
                        "the teacher's hidden states are not finite",
                        where=f"records {', '.join(row.id for row in rows[:5])}{', …' if len(rows) > 5 else ''}",
                        fix="check the teacher's weights, or use teacher.dtype=float32 hardware.precision=float32",
                    )
        self.computed = Tokens(
            self.computed.response + sum(map(len, parts)), self.computed.total + sum(row.num_tokens for row in shard)
        )
        return torch.cat(parts)
