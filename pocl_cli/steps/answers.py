"""Answers of a model to rows, as score, the dev evaluation and evaluate need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocl_cli.models.generate import generate
from pocl_cli.models.sampling import row_seed
from pocl_cli.models.vocabulary import num_real_tokens

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.load import LoadedModel
    from pocl_cli.records import TokenisedRow
    from pocl_cli.schema import DecodingConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer: its text without special tokens, its length in tokens, and whether it ended by itself."""

    text: str
    num_tokens: int
    ended: bool


def answer(
    loaded: LoadedModel,
    rows: Sequence[TokenisedRow],
    *,
    decoding: DecodingConfig,
    seed: int,
    purpose: str,
    hardware: Hardware,
    advance: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The model's answer to the prompt of each row, in order. A row draws from the stream of (seed, id, purpose)."""
    done = 0

    def on_finished(finished: int) -> None:
        nonlocal done
        if advance is not None:
            advance(finished - done)
        done = finished

    with hardware.autocast():
        generated = generate(
            loaded.model,
            [row.prompt_ids for row in rows],
            seeds=[row_seed(seed, row.id, purpose) for row in rows],
            decoding=decoding,
            eos_token_ids=loaded.eos_token_ids,
            pad_token_id=loaded.pad_token_id,
            max_tokens_per_batch=4 * hardware.max_tokens_per_micro_batch,
            context_length=loaded.context_length,
            vocabulary_size=num_real_tokens(loaded.tokenizer),
            on_finished=on_finished,
        )
    texts = loaded.tokenizer.batch_decode([list(one.token_ids) for one in generated], skip_special_tokens=True)
    return [Answer(text, len(one.token_ids), one.ended) for text, one in zip(texts, generated, strict=True)]
