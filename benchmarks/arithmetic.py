"""The multiply-adds that an optimizer step cannot do without, counted from the modules' shapes.

T tokens of the rows without padding, N response tokens, V real tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.records import TokenisedRow


@dataclass(frozen=True)
class Forward:
    """Multiply-adds of one forward pass.

    Attributes:
        linear: every weight matrix of the layers on every one of the T tokens; an embedding is a lookup and is free.
        attention: scores and weighted values, each token with itself and those before it in its row.
        head: D × V on the N response tokens.
    """

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def forward(headed: HeadedModel, rows: Sequence[TokenisedRow], num_real_tokens: int) -> Forward:
    """What one forward pass of a model over `rows` must compute."""
    config = headed.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    pairs = sum(row.num_tokens * (row.num_tokens + 1) // 2 for row in rows)
    return Forward(
        linear=_weights_in_layers(headed) * sum(row.num_tokens for row in rows),
        attention=2 * width * config.num_hidden_layers * pairs,
        head=headed.hidden_size * num_real_tokens * sum(len(row.response_ids) for row in rows),
    )


def optimizer_step(student: Forward, teacher: Forward, side: str) -> int:
    """Multiply-adds of a step: the student forward and, twice as much, backward; of the teacher what `side` needs."""
    teacher_total = {"online": teacher.total, "stored": teacher.head}[side]
    return 3 * student.total + teacher_total


def _weights_in_layers(headed: HeadedModel) -> int:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    in_head = set(headed.head.modules())
    linear = (module for module in headed.model.modules() if isinstance(module, nn.Linear | Conv1D))
    return sum(module.weight.numel() for module in linear if module not in in_head)
