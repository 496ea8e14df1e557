"""Training rows whose responses are the stored answers of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from pocl_cli.data.tokenise import TokenisedDataset
    from pocl_cli.records import TokenisedRow


class AnsweredRows:
    """The rows of a data set under their ids, with answers in place of the gold responses.

    EOS follows an answer that ended by itself, so that an empty one is EOS alone; one that a length limit cut has none.

    Args:
        gold: the rows.
        token_ids: a list of token ids a row, in the order of `gold.ids`, without EOS.
        ended: whether the answer of each row ended by itself.
        eos_id: the token that ends a response.
    """

    def __init__(self, gold: TokenisedDataset, token_ids: pa.ChunkedArray, ended: pa.ChunkedArray, *, eos_id: int):
        self._gold, self._eos_id = gold, eos_id
        lists: Any = token_ids.combine_chunks()
        self._offsets, self._values = lists.offsets.to_numpy(), lists.values.to_numpy()
        self._ended = ended.to_numpy()
        self._index = {row_id: index for index, row_id in enumerate(gold.ids)}
        assert len(self._ended) == len(gold.ids), "an answer a row"
        lengths = np.diff(self._offsets)
        assert np.all(lengths[~self._ended] > 0), "an empty answer ended by itself"

    @property
    def ids(self) -> tuple[str, ...]:
        return self._gold.ids

    def __len__(self) -> int:
        return len(self._gold)

    def row(self, row_id: str) -> TokenisedRow:
        """The prompt of the row `row_id` and its answer."""
        index = self._index[row_id]
        ended = bool(self._ended[index])
        answer: list[int] = self._values[self._offsets[index] : self._offsets[index + 1]].tolist()
        response_ids = [*answer, self._eos_id] if ended else answer
        return replace(self._gold.row(row_id), response_ids=response_ids, response_cut=not ended)

    def num_tokens(self, row_id: str) -> int:
        """The number of tokens of prompt and answer together, EOS included."""
        return self.row(row_id).num_tokens
