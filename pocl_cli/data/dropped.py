"""The reasons why a row is not used, and their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pocl_cli.records import DroppedRow

EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
EMPTY_TEXT = "empty text"
LONE_SURROGATE = "text with a lone surrogate"
NO_ANSWER = "conversation without an assistant's turn"
MULTI_TURN = "conversation of several turns"
NOT_A_PAIR = "conversation that is not one user turn and its answer"
NO_ROOM = "no room for the instruction in the prompt"
NO_TOKENS = "response without tokens"
SPECIAL_TOKEN = "text that the tokenizer turns into a special token"


def long_prompt(max_prompt_tokens: int) -> str:
    """The reason for rows that `dataset.long_prompts=drop` leaves out."""
    return f"prompt longer than {max_prompt_tokens} tokens"


def long_document(max_tokens: int) -> str:
    """The reason for documents that `dataset.long_documents=drop` leaves out."""
    return f"document longer than {max_tokens} tokens"


def count_reasons(dropped: Iterable[DroppedRow]) -> dict[str, int]:
    """The number of rows for each reason, the most frequent first."""
    counts = Counter(row.reason for row in dropped)
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def reasons_text(dropped: Iterable[DroppedRow]) -> str:
    """The counts for a log or error line: "3 × empty response, 1 × empty prompt"."""
    return ", ".join(f"{count} × {reason}" for reason, count in count_reasons(dropped).items())
