"""The teacher's final hidden states, stored as `pocl distill` stores them: computed once before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cases import Case, Setup

if TYPE_CHECKING:
    from pocl_cli.artifacts import Artifact, Work
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.teacher import OnlineTeacher, Teacher
    from pocl_cli.records import TokenisedRow


@dataclass(frozen=True)
class _Rows:
    by_id: dict[str, TokenisedRow]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.by_id)

    def row(self, row_id: str) -> TokenisedRow:
        return self.by_id[row_id]

    def num_tokens(self, row_id: str) -> int:
        return self.by_id[row_id].num_tokens


def fill(setup: Setup, outputs: Path) -> None:
    """Runs the teacher over the setup's rows; its hidden states and its head are then below `outputs`."""
    import torch

    from pocl_cli.models.device import Hardware
    from pocl_cli.training.objective import collate

    case = Case(setup)
    hardware = Hardware(torch.device("cpu"), "float32", max_tokens_per_micro_batch=4096, objective_memory_mb=256)
    stored_teacher(case, outputs, hardware).hidden_states(collate(case.rows))


def stored_teacher(case: Case, outputs: Path, hardware: Hardware) -> Teacher:
    """The teacher that reads what lies below `outputs`; its model is loaded only for what does not."""
    from pocl_cli.artifacts import ArtifactKey, Store
    from pocl_cli.models.head import split_model
    from pocl_cli.models.teacher import OnlineTeacher
    from pocl_cli.training.stored_teacher import open_teacher
    from pocl_cli.training.teacher_signals import TeacherSignals

    def commit(work: Work) -> Artifact:
        return work.commit(config={}, inputs={}, command=[], seed=None)

    def load() -> OnlineTeacher:
        return OnlineTeacher(split_model(case.load_teacher().model))

    signals = TeacherSignals(
        Store(outputs),
        _Rows({row.id: row for row in case.rows}),
        head_key=ArtifactKey("teacher_signals", "head", {}, 1),
        shard_key=lambda number, content: ArtifactKey("teacher_signals", f"shard-{number}", {"rows": content}, 1),
        commit=commit,
    )
    return open_teacher(signals, load, hardware=hardware)
