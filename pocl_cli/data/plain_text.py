"""The token ids of plain text, for language modelling: no prompt, every token but a document's first is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pocl_cli.data.dropped import NO_TOKENS, SPECIAL_TOKEN, long_document
from pocl_cli.data.token_ids import dropped, eos_id, special_ids, token_ids
from pocl_cli.records import DroppedRow, Record, TokenisedRow, piece_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEncoder:
    """Turns documents into rows whose prompt is one token and whose response is all that follows, EOS at last.

    A document of more than `max_tokens` becomes several rows. Each begins with the last token of the one before, so
    that every token but the document's first is predicted once.

    Args:
        tokenizer: needs an EOS token.
        max_tokens: most tokens of a row, EOS included.
        long_documents: "cut" as above; "drop" leaves longer documents out.

    Raises:
        ConfigError: the tokenizer has no EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, long_documents: Literal["cut", "drop"]
    ) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.drops_long_documents = long_documents == "drop"
        self.eos_id = eos_id(tokenizer)
        self._special_ids = special_ids(tokenizer)

    def encode_batch(self, records: Sequence[Record]) -> list[TokenisedRow | DroppedRow]:
        """The rows of each record in their order, or the reason why it has none."""
        documents = token_ids(self.tokenizer, [record.response for record in records])
        return [row for record, ids in zip(records, documents, strict=True) for row in self._rows(record, ids)]

    def _rows(self, record: Record, ids: list[int]) -> list[TokenisedRow | DroppedRow]:
        if not ids:
            return [dropped(record, NO_TOKENS)]
        if not self._special_ids.isdisjoint(ids):
            return [dropped(record, SPECIAL_TOKEN)]
        ids = [*ids, self.eos_id]
        if self.drops_long_documents and len(ids) > self.max_tokens:
            return [dropped(record, long_document(self.max_tokens))]
        starts = range(0, len(ids) - 1, self.max_tokens - 1)
        return [
            TokenisedRow(
                piece_id(record.id, number),
                ids[start : start + 1],
                ids[start + 1 : start + self.max_tokens],
                response_cut=start + self.max_tokens < len(ids),
            )
            for number, start in enumerate(starts, 1)
        ]
