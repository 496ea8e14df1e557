"""Stages with different teachers: each is opened when its stage begins, and the one before is let go first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pocl_cli.log import get_logger
from pocl_cli.models.load import load_tokenizer
from pocl_cli.models.vocabulary import align_vocabularies
from pocl_cli.steps.teacher import check_room, teacher_of, teacher_source
from pocl_cli.training import checkpoint
from pocl_cli.training.stored_teacher import StoredTeacher

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.load import LoadedModel
    from pocl_cli.models.teacher import Teacher
    from pocl_cli.steps.chain import Chain
    from pocl_cli.training.loop import Teach
    from pocl_cli.training.shards import Rows


class StageTeachers:
    """The teachers of a chain's stages, of which at most one is in memory.

    Args:
        chain: with a lesson a stage.
        student: which they teach.
        student_width: rows of its output layer.
        rows: which the teachers are asked for.
        hardware: of the process.
        checkpoints: the folder beside whose checkpoints is noted where hidden states come from; None: another process
            does it.

    Raises:
        ResourceError: the hidden states that are missing of all of them would not fit on the disk.
    """

    def __init__(
        self,
        chain: Chain,
        student: LoadedModel,
        student_width: int,
        rows: Rows,
        hardware: Hardware,
        checkpoints: Path | None,
    ) -> None:
        check_room(chain.taught, rows)
        self._lessons, self._student, self._student_width = chain.lessons, student, student_width
        self._rows, self._hardware, self._checkpoints = rows, hardware, checkpoints
        self._lesson: Chain | None = None
        self._teacher: Teacher | None = None

    def begin(self, stage: int, teach: Teach) -> None:
        """Hands over the teacher of a stage that begins or goes on, unless it is the one that is there.

        Raises:
            ArtifactError: the run was begun with this teacher's hidden states from elsewhere, or they are damaged.
            ConfigError: its tokenizer is not the student's.
        """
        lesson = self._lessons[stage]
        if lesson is not self._lesson:
            self.close()
            teach(None)
            self._lesson, self._teacher = lesson, self._opened(lesson)
            teach(self._teacher)
        assert self._teacher is not None, "a lesson has a teacher"
        source = teacher_source(self._teacher)
        get_logger().info("stage %d: the teacher is %s (%s)", stage, lesson.config.teacher.name, source)
        if self._checkpoints is not None:
            checkpoint.refuse_other_teacher(self._checkpoints, source, stage)

    def close(self) -> None:
        """Lets go of the teacher, and says what its stored hidden states have saved."""
        tell_savings(self._teacher)
        self._teacher = None

    def _opened(self, lesson: Chain) -> Teacher:
        teacher = teacher_of(lesson, self._rows, self._hardware, stored=lesson.stores_teacher)
        align_vocabularies(
            student_tokenizer=self._student.tokenizer,
            student_width=self._student_width,
            teacher_tokenizer=load_tokenizer(lesson.model("teacher")),
            teacher_width=teacher.num_logits,
        )
        return teacher


def tell_savings(teacher: Teacher | None) -> None:
    """Says in the log what a teacher's stored hidden states have saved."""
    if isinstance(teacher, StoredTeacher):
        get_logger().info("teacher tokens saved by its stored hidden states: %s", teacher.savings())
