"""The teacher as the objective sees it: hidden states of given tokens, and the head that turns them into logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pocl_cli.models.batch import Batch
    from pocl_cli.models.head import HeadedModel, OutputHead


class Teacher(Protocol):
    """Where the teacher's side of the distillation term comes from."""

    @property
    def head(self) -> OutputHead:
        """Hidden states → logits."""
        ...

    @property
    def num_logits(self) -> int:
        """Width of the logits, padding rows included."""
        ...

    @property
    def packs(self) -> bool:
        """Whether the teacher reads rows without padding."""
        ...

    @property
    def backbone(self) -> PreTrainedModel | None:
        """The model that every batch is given to; None where batches are looked up."""
        ...

    def hidden_states(self, batch: Batch) -> Tensor:
        """The final hidden states that predict the response tokens `[N, E]`, without dropout and without gradients.

        Row after row in the order of `batch.ids`, each row's tokens in order.
        """
        ...


class OnlineTeacher:
    """Runs the teacher for every batch. Not a module, so that no optimizer, checkpoint or mode switch reaches it.

    Attributes:
        headed: its model, in evaluation mode and without gradients.
    """

    def __init__(self, headed: HeadedModel) -> None:
        self.headed = headed.eval().requires_grad_(False)

    @property
    def head(self) -> OutputHead:
        """Hidden states → logits."""
        return self.headed.head

    @property
    def num_logits(self) -> int:
        """Width of the logits, padding rows included."""
        return self.headed.num_logits

    @property
    def packs(self) -> bool:
        """Whether the teacher reads rows without padding."""
        return self.headed.packs

    @property
    def backbone(self) -> PreTrainedModel:
        """The teacher's model."""
        return self.headed.model

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """As `Teacher.hidden_states`."""
        return self.headed.hidden_states(batch)
