"""The student's answers of earlier steps, which serve again: a buffer in the state of a KD method.

It is made of integer tensors, so that it is saved with every checkpoint; it is the same in all processes, which all
have all answers of a step, so that each of them resumes from the one file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from pocl_cli.losses.on_policy import REPLAY_ROWS, REPLAY_STARTS, REPLAY_TOKENS, num_replayable
from pocl_cli.seeds import permutation

if TYPE_CHECKING:
    from pocl_cli.losses.evolving import MethodState
    from pocl_cli.records import TokenisedRow
    from pocl_cli.training.shards import Rows
    from pocl_cli.training.step import PartRows


class Replay:
    """Draws from the buffer and adds to it; both are pure in the state.

    Args:
        rows: the gold rows, whose prompts are answered.
        size: newest answers that are kept.
        seed: of the training.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, rows: Rows, *, size: int, seed: int, eos_token_ids: Collection[int]) -> None:
        self._rows, self._size, self._seed = rows, size, seed
        self._ids = rows.ids
        self._places = {row_id: place for place, row_id in enumerate(self._ids)}
        self._eos_token_ids = eos_token_ids

    def draw(self, state: MethodState, num_rows: int, step: int) -> list[TokenisedRow]:
        """Rows with answers of the buffer, without repetition, for the step after `step` others; in random order."""
        held = num_replayable(state)
        assert num_rows <= held, f"{num_rows} answers of a buffer of {held}"
        answers, places = self._answers(state), state[REPLAY_ROWS].tolist()
        chosen = permutation(held, self._seed, "replay", step)[:num_rows].tolist()
        return [self._row(places[number], answers[number]) for number in chosen]

    def after(self, state: MethodState, parts: Sequence[PartRows]) -> MethodState:
        """The state with the generated rows of a step in the buffer, where the oldest make room."""
        written = [row for of_part in parts if of_part.part.rows == "generated" for row in of_part.rows]
        if not written:
            return state
        held = zip(state[REPLAY_ROWS].tolist(), self._answers(state), strict=True) if num_replayable(state) else ()
        kept = [*held, *((self._places[row.id], list(row.response_ids)) for row in written)][-self._size :]
        starts = [0, *accumulate(len(answer) for _, answer in kept)]
        return {
            **state,
            REPLAY_TOKENS: torch.tensor([token for _, answer in kept for token in answer]),
            REPLAY_STARTS: torch.tensor(starts),
            REPLAY_ROWS: torch.tensor([place for place, _ in kept]),
        }

    def _answers(self, state: MethodState) -> list[list[int]]:
        tokens = state[REPLAY_TOKENS].tolist()
        return [tokens[start:end] for start, end in pairwise(state[REPLAY_STARTS].tolist())]

    def _row(self, place: int, answer: list[int]) -> TokenisedRow:
        gold = self._rows.row(self._ids[place])
        return replace(gold, response_ids=answer, response_cut=answer[-1] not in self._eos_token_ids)
