"""From texts to token ids and back to places in the text: what the encoders of all formats share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pocl_cli.errors import ConfigError
from pocl_cli.records import DroppedRow, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW_CHARACTERS = 1 << 14


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the EOS token. Raises ConfigError where there is none."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no EOS token",
            where=str(tokenizer.name_or_path) or None,
            why="without one the student never learns where an answer ends",
            fix="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that no text of a row may give: special tokens, except one that only stands for unknown text."""
    ids = set(tokenizer.all_special_ids)
    ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(ids - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}))


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, names_are_text: bool = True
) -> list[list[int]]:
    """The ids of each text, none added; `names_are_text`: the name of a special token is split like any text."""
    encoding: Any = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=names_are_text,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def longest_beginning(
    text: str, fits: Callable[[str], bool], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> str:
    """The longest beginning of `text`, up to the end of a token, that fits; all of `text` does not.

    Args:
        text: to be shortened.
        fits: whether a beginning does; where one does, every shorter one does.
        tokenizer: whose tokens are not cut.
        max_tokens: no beginning of more tokens fits.
    """
    ends = [0, *_token_ends(text, tokenizer, max_tokens)]
    fitting, too_long = 0, len(ends)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if fits(text[: ends[middle]]):
            fitting = middle
        else:
            too_long = middle
    return text[: ends[fitting]]


def _token_ends(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[int]:
    """Where the first tokens of `text` end, counted in characters: never inside one that has several tokens."""
    if not tokenizer.is_fast:
        # Slow tokenizers do not tell; every character is tried instead.
        return list(range(1, len(text) + 1))
    window = 0
    ends: list[int] = []
    while len(ends) < max_tokens and window < len(text):
        # A huge text is not tokenised as a whole for the sake of its first words.
        window = max(4 * window, _WINDOW_CHARACTERS)
        encoding: Any = tokenizer(
            text[:window],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        ends = sorted({end for _, end in encoding["offset_mapping"] if end > 0})
    return ends[:max_tokens]


def dropped(record: Record, reason: str) -> DroppedRow:
    """The record as one that is not used."""
    return DroppedRow(f"record {record.id}", reason, record.id)
