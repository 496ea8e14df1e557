"""Training rows whose responses are the stored answers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from pocl_cli.records import TokenisedRow
    from pocl_cli.training.shards import Rows

# Between the id of a row and the model that answered it.
_MARK = "@"


class AnsweredRows:
    """The rows of a data set with a model's answers in place of the gold responses, and with ids of their own.

    EOS follows an answer that ended by itself, so that an empty one is EOS alone; one that a length limit cut has none.

    Args:
        who: the model that answered; it stands after the id of the gold row.
        gold: the rows.
        token_ids: a list of token ids a row, in the order of `gold.ids`, without EOS.
        ended: whether the answer of each row ended by itself.
        eos_id: the token that ends a response.
    """

    def __init__(
        self, who: str, gold: Rows, token_ids: pa.ChunkedArray, ended: pa.ChunkedArray, *, eos_id: int
    ) -> None:
        self._who, self._gold, self._eos_id = who, gold, eos_id
        lists: Any = token_ids.combine_chunks()
        self._offsets, self._values = lists.offsets.to_numpy(), lists.values.to_numpy()
        self._ended = ended.to_numpy()
        self._index = {row_id: index for index, row_id in enumerate(gold.ids)}
        assert len(self._ended) == len(gold.ids), "an answer a row"
        lengths = np.diff(self._offsets)
        assert np.all(lengths[~self._ended] > 0), "an empty answer ended by itself"

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the answered rows."""
        return tuple(f"{row_id}{_MARK}{self._who}" for row_id in self._gold.ids)

    def __len__(self) -> int:
        return len(self._ended)

    def row(self, row_id: str) -> TokenisedRow:
        """The prompt of the gold row `row_id` and its answer."""
        index = self._index[row_id]
        ended = bool(self._ended[index])
        answer: list[int] = self._values[self._offsets[index] : self._offsets[index + 1]].tolist()
        return replace(
            self._gold.row(row_id),
            id=f"{row_id}{_MARK}{self._who}",
            response_ids=[*answer, self._eos_id] if ended else answer,
            response_cut=not ended,
        )


class Together:
    """The answered rows of several models under their own ids: what a teacher is asked for."""

    def __init__(self, answers: Mapping[str, AnsweredRows]) -> None:
        self._answers = answers
        self.ids = tuple(row_id for rows in answers.values() for row_id in rows.ids)

    def row(self, row_id: str) -> TokenisedRow:
        """The row of that id."""
        gold, _, who = row_id.rpartition(_MARK)
        return self._answers[who].row(gold)

    def num_tokens(self, row_id: str) -> int:
        """The number of tokens of its prompt and answer together, EOS included."""
        return self.row(row_id).num_tokens
