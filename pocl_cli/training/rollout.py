"""Rows of a step whose responses the student writes itself, before the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pocl_cli.models.generate import Mixture, generate
from pocl_cli.models.sampling import row_seed
from pocl_cli.models.teacher import OnlineTeacher, Teacher
from pocl_cli.records import TokenisedRow
from pocl_cli.training.measure import records_named
from pocl_cli.training.sampler import share

if TYPE_CHECKING:
    from pocl_cli.schema import DecodingConfig
    from pocl_cli.training.replica import Replica


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How the student answers the prompts of a global batch.

    Attributes:
        decoding: how the answers are drawn.
        seed: of the training.
        eos_token_ids: tokens that end an answer.
        pad_token_id: of the tokenizer.
        max_tokens: most tokens of prompt and answer together, as of the data set's rows.
        teacher_mix: the teacher's share of the probabilities that every token is drawn by, 0..1.
    """

    decoding: DecodingConfig
    seed: int
    eos_token_ids: Collection[int]
    pad_token_id: int
    max_tokens: int
    teacher_mix: float = 0.0

    def rows(self, gold: Sequence[TokenisedRow], step: int, replica: Replica) -> list[TokenisedRow]:
        """The rows with other responses, in order; the same in all processes, each of which answers its share.

        All processes come here together. An answer draws from the stream of (seed, record id, step), whatever the
        batches and processes; rows of one id have streams of their own. The EOS that ended an answer is its last token;
        one that was cut has none. An answer has a token in any case.

        Args:
            gold: a global batch.
            step: number of optimizer steps before it.
            replica: of the student.

        Raises:
            ConfigError: the teacher takes part, and an architecture does not allow for it.
            NonFiniteError: the student gives logits that are not finite; records are named.
            WorkerError: another process is gone.
        """
        streams = self._streams(gold, step)
        numbered = [replace(row, id=str(place)) for place, row in enumerate(gold)]
        own = [int(row.id) for row in share(numbered, replica.processes.rank, replica.processes.size)]
        with replica.whole():
            answers = self._answers([gold[place] for place in own], [streams[place] for place in own], replica)
        longest = replica.processes.largest(max(map(len, answers), default=0))
        # A token is one more than its id: 0 is where an answer has ended, and what other processes write is added.
        table = torch.zeros(len(gold), longest, dtype=torch.int64)
        for place, answer in zip(own, answers, strict=True):
            table[place, : len(answer)] = torch.tensor(answer) + 1
        written = [[token - 1 for token in line if token] for line in replica.processes.sum(table).tolist()]
        return [
            replace(row, response_ids=answer, response_cut=answer[-1] not in self.eos_token_ids)
            for row, answer in zip(gold, written, strict=True)
        ]

    def _streams(self, gold: Sequence[TokenisedRow], step: int) -> list[int]:
        """The seed of each row's answer."""
        seen: Counter[str] = Counter()
        streams = []
        for row in gold:
            streams.append(row_seed(self.seed, row.id, f"training {step} {seen[row.id]}"))
            seen[row.id] += 1
        return streams

    def _answers(self, rows: Sequence[TokenisedRow], streams: Sequence[int], replica: Replica) -> list[list[int]]:
        if not rows:
            return []
        student = replica.student
        with student.hardware.autocast(), records_named(rows):
            generated = generate(
                student.headed,
                [row.prompt_ids for row in rows],
                seeds=[[stream] for stream in streams],
                decoding=self.decoding,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                max_tokens_per_batch=student.hardware.max_tokens_per_micro_batch,
                context_length=self.max_tokens,
                vocabulary_size=student.num_real_tokens,
                mixture=self._mixture(student.teacher) if self.teacher_mix else None,
            )
        return [
            [*answer.token_ids, *(() if answer.end_token is None else (answer.end_token,))] for (answer,) in generated
        ]

    def _mixture(self, teacher: Teacher | None) -> Mixture:
        assert isinstance(teacher, OnlineTeacher), "a teacher that takes part in answers runs beside the student"
        return Mixture(teacher.headed, self.teacher_mix)
