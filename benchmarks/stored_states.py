"""The teacher's final hidden states on disk, by record id: computed once before anything is timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cases import Case, Setup

if TYPE_CHECKING:
    from torch import Tensor

    from pocl_cli.models.batch import Batch
    from pocl_cli.models.head import OutputHead


def fill(setup: Setup, path: Path) -> int:
    """Runs the teacher over the setup's rows and writes `path`. Returns the bytes of the hidden states."""
    from safetensors.torch import save_file

    from pocl_cli.models.head import split_model
    from pocl_cli.models.teacher import OnlineTeacher
    from pocl_cli.training.objective import collate

    case = Case(setup)
    loaded = case.load_teacher()
    teacher = OnlineTeacher(split_model(loaded.model))
    states = {row.id: teacher.hidden_states(collate([row])) for row in case.rows}
    save_file(states, path)
    return sum(state_nE.nbytes for state_nE in states.values())


def teacher_head(case: Case) -> OutputHead:
    """The teacher's head; the rest of the teacher is freed when this returns."""
    from pocl_cli.models.head import split_model

    return split_model(case.load_teacher().model).eval().requires_grad_(False).head


class StoredTeacher:
    """Reads what `OnlineTeacher` would compute. The file is memory-mapped."""

    def __init__(self, path: Path, head: OutputHead) -> None:
        from safetensors import safe_open

        self.head = head
        self._file = safe_open(path, framework="pt")

    @property
    def num_logits(self) -> int:
        """Width of the logits, padding rows included."""
        return self.head.num_logits

    @property
    def packs(self) -> bool:
        """No forward pass, no padding."""
        return True

    def hidden_states(self, batch: Batch) -> Tensor:
        """The final hidden states that predict the response tokens `[N, E]`, in the order of `batch.ids`."""
        import torch

        return torch.cat([self._file.get_tensor(record_id) for record_id in batch.ids])
