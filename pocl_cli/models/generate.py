"""Decoding: answers whose tokens do not depend on how the rows are batched.

Every prompt is read once, whatever the number of its answers; answers are decoded in slots of a key-value cache, and
one that ends makes place for the next. Architectures without such a cache are decoded in batches of padded rows.

Shapes: P prompts of a group, L tokens of the longest, R rows in the slots, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from pocl_cli import faults
from pocl_cli.errors import ConfigError
from pocl_cli.models.batch import make_batch
from pocl_cli.models.decoded_row import DecodedRow, DecodingRule
from pocl_cli.models.packed import packed_linears
from pocl_cli.models.padded_decoding import decode_padded
from pocl_cli.models.sampling import NoRepeatNgrams
from pocl_cli.models.slots import SlotCache, bytes_per_slot_token

if TYPE_CHECKING:
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.schema import DecodingConfig

# Cached tokens for each token of a forward pass: between so many and, while they take little memory, so many. Training
# keeps about that much of a micro-batch.
_CACHED_TOKENS, _MOST_CACHED_TOKENS, _LITTLE_MEMORY = 4, 16, 2**30
# More rows than this gain nothing on the CPU: its products are as fast as they get, and the logits leave its caches.
_MOST_ROWS_ON_CPU = 128
# New rows come once this share of the slots is free: reading prompts one by one costs a step each.
_REFILL_ABOVE = 1 / 8


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated answer: `token_ids` without EOS, and the EOS that ended it; None where a length limit cut it."""

    token_ids: tuple[int, ...]
    end_token: int | None

    @property
    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.end_token is not None


class PromptReader(Protocol):
    """Reads prompts into a cache; who has more to read in the same pass (the references) brings a reader for it."""

    def num_tokens(self, prompt: int) -> int:
        """Number of tokens that are read for prompt number `prompt`, at least the prompt's own."""

    def read(self, prompts: Sequence[int], cache: Cache) -> Tensor:
        """Reads prompts into an empty cache, from column 0 on; returns the states of their last tokens, [P, D]."""


@torch.no_grad()
def generate(
    headed: HeadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    eos_token_ids: Collection[int],
    pad_token_id: int,
    max_tokens_per_batch: int,
    context_length: int | None,
    vocabulary_size: int | None = None,
    reader: PromptReader | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[Generated]]:
    """The answers to each prompt, one a seed, prompts and seeds in input order.

    An answer draws from the stream of its seed alone, so its tokens do not depend on the other rows, up to the rounding
    of the logits. The model is in evaluation mode meanwhile.

    Args:
        prompts: token ids of each prompt, without padding, at least one each.
        seeds: the seeds of each prompt's answers, below 2^64 (see `sampling.row_seed`).
        eos_token_ids: tokens that end an answer; they are not part of it.
        max_tokens_per_batch: bound on the tokens of a forward pass, padding included; the cache holds 4 to 16 times as
            many. One prompt with all its answers always goes.
        context_length: positions that the model has; an answer is cut where they end. None: no limit.
        vocabulary_size: the tokenizer's number of tokens; embedding rows beyond it (padding) are never generated.
        reader: reads more than the prompts; asked only where the model can be decoded in slots.
        on_finished: called with the number of answers finished so far, as they finish.

    Raises:
        ConfigError: a prompt fills the whole context, or the model has no cache that can be decoded with.
        NonFiniteError: the model gives a NaN or infinite logit.
    """
    rows = [
        [_row(prompt, seed, decoding, context_length) for seed in its_seeds]
        for prompt, its_seeds in zip(prompts, seeds, strict=True)
    ]
    rule = DecodingRule(decoding, frozenset(eos_token_ids), vocabulary_size)
    was_training = headed.model.training
    headed.model.train(False)
    try:
        with packed_linears(headed.model):
            num_bytes = bytes_per_slot_token(headed)
            if num_bytes is not None:
                reader = reader or _Prompts(headed, prompts)
                slots = _make_slots(headed, rows, max_tokens_per_batch, num_bytes)
                steps = _decode_in_slots(headed, rows, reader, rule, slots, max_tokens_per_batch)
            else:
                steps = decode_padded(
                    headed.model,
                    [row for its_rows in rows for row in its_rows],
                    rule,
                    pad_token_id=pad_token_id,
                    context_length=context_length,
                    max_tokens=_CACHED_TOKENS * max_tokens_per_batch,
                )
            num_finished = 0
            for num_more in steps:
                faults.reached("decode")
                num_finished += num_more
                if on_finished is not None and num_more:
                    on_finished(num_finished)
    finally:
        headed.model.train(was_training)
    return [[Generated(tuple(row.tokens), row.end_token) for row in its_rows] for its_rows in rows]


def _row(prompt: Sequence[int], seed: int, decoding: DecodingConfig, context_length: int | None) -> DecodedRow:
    assert len(prompt) > 0, "a prompt without tokens"
    room = decoding.max_new_tokens if context_length is None else context_length - len(prompt)
    if room <= 0:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer",
            why=f"the model's context is {context_length} tokens",
            fix="lower dataset.max_prompt_tokens",
        )
    size = decoding.no_repeat_ngram_size
    return DecodedRow(prompt, seed, min(decoding.max_new_tokens, room), NoRepeatNgrams(size, prompt) if size else None)


class _Prompts:
    """Reads the prompts and no more."""

    def __init__(self, headed: HeadedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._headed, self._prompts = headed, prompts

    def num_tokens(self, prompt: int) -> int:
        return len(self._prompts[prompt])

    def read(self, prompts: Sequence[int], cache: Cache) -> Tensor:
        rows = [self._prompts[prompt] for prompt in prompts]
        batch = make_batch(map(str, prompts), rows, [range(len(row) - 1, len(row)) for row in rows], [])
        return self._headed.hidden_states(batch.to(self._headed.model.device), cache)


def _make_slots(
    headed: HeadedModel, rows: Sequence[Sequence[DecodedRow]], max_tokens: int, bytes_per_token: int
) -> SlotCache:
    """As many slots as the budget allows and the rows need; at least one prompt's rows can enter."""
    every = [row for its_rows in rows for row in its_rows]
    capacity = max((len(row.prompt) + row.limit for row in every), default=1)
    num_tokens = max(_LITTLE_MEMORY // bytes_per_token, _CACHED_TOKENS * max_tokens)
    num_slots = min(num_tokens, _MOST_CACHED_TOKENS * max_tokens) // capacity
    if headed.model.device.type == "cpu":
        num_slots = min(num_slots, _MOST_ROWS_ON_CPU)
    most_answers = max((len(its_rows) for its_rows in rows), default=0)
    return SlotCache(min(max(num_slots, most_answers), len(every)), capacity)


def _decode_in_slots(
    headed: HeadedModel,
    rows: Sequence[Sequence[DecodedRow]],
    reader: PromptReader,
    rule: DecodingRule,
    slots: SlotCache,
    max_tokens: int,
) -> Iterator[int]:
    """Decodes the rows of all prompts; yields how many finish, step by step.

    The longest prompts go first, so that memory runs out at once or never.
    """
    answered = [prompt for prompt, its_rows in enumerate(rows) if its_rows]
    waiting = deque(sorted(answered, key=lambda prompt: (-reader.num_tokens(prompt), prompt)))
    most_answers = max((len(its_rows) for its_rows in rows), default=0)
    live: list[DecodedRow] = []  # live[i] is in slot i
    inputs: list[int] = []  # their tokens that have not been read
    enough = max(most_answers, int(_REFILL_ABOVE * slots.num_slots))  # free slots that call for new rows
    while waiting or live:
        while waiting and (not live or slots.num_slots - len(live) >= enough):
            group = _take_group(waiting, rows, reader, max_tokens, slots.num_slots - len(live))
            inputs += _enter(headed, group, rows, reader, rule, slots)
            live += [row for prompt in group for row in rows[prompt]]
            yield _let_go(live, inputs, slots)
        if live:
            inputs = rule.next_tokens(headed.head(slots.step(headed, inputs)), live)
            yield _let_go(live, inputs, slots)


def _take_group(
    waiting: deque[int], rows: Sequence[Sequence[DecodedRow]], reader: PromptReader, max_tokens: int, free: int
) -> list[int]:
    """Takes the next prompts that fit one forward pass and whose rows fit the free slots; one at least.

    They come by length: neighbours in the slots attend together, to the columns of the longest.
    """
    longest = reader.num_tokens(waiting[0])
    group: list[int] = []
    while waiting and (not group or (len(group) + 1) * longest <= max_tokens):
        free -= len(rows[waiting[0]])
        if free < 0:
            break
        group.append(waiting.popleft())
    return sorted(group, key=lambda prompt: len(rows[prompt][0].prompt))


def _enter(
    headed: HeadedModel,
    group: Sequence[int],
    rows: Sequence[Sequence[DecodedRow]],
    reader: PromptReader,
    rule: DecodingRule,
    slots: SlotCache,
) -> list[int]:
    """Reads a group of prompts and puts their rows into slots; returns the rows' first tokens."""
    cache = DynamicCache(config=headed.model.config.get_text_config(decoder=True))
    logits_PV = headed.head(reader.read(group, cache))
    entering = [row for prompt in group for row in rows[prompt]]
    sources = [place for place, prompt in enumerate(group) for _ in rows[prompt]]
    slots.enter(cache, sources, [len(row.prompt) for row in entering])
    return rule.next_tokens(logits_PV[torch.tensor(sources, device=logits_PV.device)], entering)


def _let_go(live: list[DecodedRow], inputs: list[int], slots: SlotCache) -> int:
    """Takes the rows that are done out of the slots and both lists; returns their number."""
    done = [slot for slot, row in enumerate(live) if row.done]
    for slot in reversed(done):  # from the end: the last row, which moves into the gap, is not done
        slots.leave(slot)
        live[slot], inputs[slot] = live[-1], inputs[-1]
        live.pop()
        inputs.pop()
    return len(done)
