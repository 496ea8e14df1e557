"""The encoder of each `dataset.format`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pocl_cli.data.plain_text import TextEncoder
from pocl_cli.data.template import RowEncoder
from pocl_cli.records import DroppedRow, Record, TokenisedRow
from pocl_cli.schema import DatasetConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(Protocol):
    """Turns records into token ids."""

    def encode_batch(self, records: Sequence[Record]) -> list[TokenisedRow | DroppedRow]:
        """The rows of each record in their order, or the reason why it has none."""


def encoder_of(tokenizer: PreTrainedTokenizerBase, config: DatasetConfig) -> Encoder:
    """The encoder for the rows of a data set. Raises ConfigError where the tokenizer or the limits do not fit it."""
    if config.format == "text":
        return TextEncoder(tokenizer, config.max_tokens, config.long_documents)
    if config.format == "messages":
        # jinja2 is for conversations alone.
        from pocl_cli.data.chat import ChatEncoder

        return ChatEncoder(tokenizer, config.max_tokens, config.max_prompt_tokens, config.long_prompts)
    return RowEncoder(tokenizer, config.max_tokens, config.max_prompt_tokens, config.long_prompts)
