"""The rows that are decoded together: their next input tokens, padding, and key-value cache.

Shapes: R rows, T new input tokens, C columns of the cache, padding included (on the left).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from pocl_cli.models.sampling import NoRepeatNgrams


@dataclass(slots=True)
class DecodedRow:
    """A row that is being decoded. `index` is its place in the input, `limit` its largest number of new tokens."""

    index: int
    seed: int
    prompt: Sequence[int]
    limit: int
    ngrams: NoRepeatNgrams | None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or len(self.tokens) >= self.limit

    @property
    def most_tokens(self) -> int:
        """Length of the prompt and the longest answer together."""
        return len(self.prompt) + self.limit

    def banned(self) -> Sequence[int]:
        """The tokens that the no-repeat rule forbids next."""
        return () if self.ngrams is None or self.done else self.ngrams.banned()

    def take(self, token: int, eos_token_ids: frozenset[int]) -> None:
        """Adds the row's next token; EOS ends it and is not kept."""
        if token in eos_token_ids:
            self.ended = True
            return
        self.tokens.append(token)
        if self.ngrams is not None:
            self.ngrams.append(token)


class DecodingBatch:
    """Rows that are padded on the left to one length. New: their prompts are the next input, and the cache is empty.

    Row r's padding is `padding[r]` columns; column c of it has position c - padding[r], so that columns of padding may
    be added or cut off at the left without any change to the row.
    """

    def __init__(
        self, rows: list[DecodedRow], config: PreTrainedConfig, *, device: torch.device, pad_token_id: int
    ) -> None:
        self.rows, self.device = rows, device
        longest = max(len(row.prompt) for row in rows)
        self._padding = [longest - len(row.prompt) for row in rows]
        padded = [[pad_token_id] * pad + list(row.prompt) for row, pad in zip(rows, self._padding, strict=True)]
        self.input_ids = torch.tensor(padded, device=device)
        self.cache = DynamicCache(config=config.get_text_config(decoder=True))
        self.num_cached = 0  # columns in the cache
        self._set_columns()

    @property
    def joinable(self) -> bool:
        """Whether columns can be added at the left: not for sliding windows and recurrent states."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    @property
    def _layers(self) -> list[Any]:
        return list(self.cache.layers)

    @property
    def num_going(self) -> int:
        """Number of rows that are not done."""
        return sum(not row.done for row in self.rows)

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for tokens, 0 for padding, [R, C + T]; None where there is no padding."""
        if not any(self._padding):
            return None
        num_columns = self.num_cached + self.input_ids.shape[1]
        return (self._columns[:num_columns] >= self._padding_R1).long()

    @property
    def position_ids(self) -> Tensor:
        """The position of each input token in its row, [R, T]; negative in padding."""
        return self._columns[self.num_cached : self.num_cached + self.input_ids.shape[1]] - self._padding_R1

    def advance(self, tokens: Sequence[int]) -> None:
        """After a forward pass: makes `tokens`, one a row, the next input."""
        self.num_cached += self.input_ids.shape[1]
        self.input_ids = torch.tensor(tokens, device=self.device).unsqueeze(-1)

    def drop_done(self) -> None:
        """Takes the rows that are done out of the batch, and the columns that are then padding in every row.

        One row at least must not be done.
        """
        kept = [place for place, row in enumerate(self.rows) if not row.done]
        if len(kept) == len(self.rows):
            return
        index = torch.tensor(kept, device=self.device)
        self.rows = [self.rows[place] for place in kept]
        self._padding = [self._padding[place] for place in kept]
        self.input_ids = self.input_ids[index]
        self.cache.reorder_cache(
            cast(torch.LongTensor, index)
        )  # batch_select_indices is missing from caches of linear attention
        spare = min(self._padding)
        if spare and self.joinable:
            self._shift(-spare)
        self._set_columns()

    def join(self, other: DecodingBatch) -> None:
        """Adds the rows of `other`, which is used up. Both have one input token a row."""
        assert self.joinable, "caches of this kind cannot be joined"
        longer = max(self.num_cached, other.num_cached)
        for batch in (self, other):
            batch._shift(longer - batch.num_cached)
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])
        self.rows = self.rows + other.rows
        self._padding = self._padding + other._padding
        self.input_ids = torch.cat([self.input_ids, other.input_ids])
        self._set_columns()

    def _shift(self, num_columns: int) -> None:
        """Adds columns of padding at the left of the cache, or cuts -num_columns of them off."""
        if num_columns == 0:
            return
        for layer in self._layers:
            layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, num_columns, 0))
            layer.values = torch.nn.functional.pad(layer.values, (0, 0, num_columns, 0))
        self._padding = [pad + num_columns for pad in self._padding]
        self.num_cached += num_columns

    def _set_columns(self) -> None:
        room = max(pad + row.most_tokens for pad, row in zip(self._padding, self.rows, strict=True))
        self._columns = torch.arange(room, device=self.device)
        self._padding_R1 = torch.tensor(self._padding, device=self.device).unsqueeze(-1)
