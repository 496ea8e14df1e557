"""Answers of a model to rows, as score, the dev evaluation and evaluate need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocl_cli.models.sampling import row_seed
from pocl_cli.models.vocabulary import num_real_tokens
from pocl_cli.training.measure import measure_and_generate

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.generate import Generated
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.models.load import LoadedModel
    from pocl_cli.records import ScoredRecord, TokenisedRow
    from pocl_cli.schema import DecodingConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer: its text without special tokens, its length in tokens, and whether it ended by itself."""

    text: str
    num_tokens: int
    ended: bool


def measure_and_answer(
    headed: HeadedModel,
    loaded: LoadedModel,
    rows: Sequence[TokenisedRow],
    *,
    decoding: DecodingConfig,
    seeds: Sequence[int],
    purpose: str,
    hardware: Hardware,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[ScoredRecord], list[list[Answer]]]:
    """The cross entropy of each row's response, and the model's answers to its prompt; both in the order of the rows.

    Args:
        headed: `loaded.model`, taken apart.
        seeds: each gives one answer a row; a row draws from the stream of (seed, id, purpose). The answers come
            seed by seed, a list of all rows each.
        advance: called with the number of answers that have just been finished.
    """
    done = 0

    def on_finished(finished: int) -> None:
        nonlocal done
        if advance is not None:
            advance(finished - done)
        done = finished

    measured, generated = measure_and_generate(
        headed,
        rows,
        seeds=[[row_seed(seed, row.id, purpose) for seed in seeds] for row in rows],
        decoding=decoding,
        eos_token_ids=loaded.eos_token_ids,
        context_length=loaded.context_length,
        num_real_tokens=num_real_tokens(loaded.tokenizer),
        pad_token_id=loaded.pad_token_id,
        hardware=hardware,
        on_finished=on_finished,
    )
    return measured, [
        [_answer(its_answers[number], loaded) for its_answers in generated] for number in range(len(seeds))
    ]


def _answer(generated: Generated, loaded: LoadedModel) -> Answer:
    text = loaded.tokenizer.decode(list(generated.token_ids), skip_special_tokens=True)
    assert isinstance(text, str), "one answer is one text"
    return Answer(text, len(generated.token_ids), generated.ended)
