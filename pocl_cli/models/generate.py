"""Decoding: answers whose tokens do not depend on how the rows are batched.

Every prompt is read once, whatever the number of its answers; answers are decoded in slots of a key-value cache, and
one that ends makes place for the next. Architectures without such a cache are decoded in batches of padded rows.

Shapes: P prompts of a group, L tokens of the longest, R rows in the slots, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
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


@dataclass(frozen=True, slots=True)
class Mixture:
    """A second model of the same tokens, and its share of the probabilities that every token is drawn by, in 0..1."""

    headed: HeadedModel
    share: float


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
    mixture: Mixture | None = None,
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
        mixture: a model that is asked beside `headed` for every token. In evaluation mode.
        on_finished: called with the number of answers finished so far, as they finish.

    Raises:
        ConfigError: a prompt fills the whole context, or the model has no cache that can be decoded with, or one of a
            mixture none with slots.
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
        with ExitStack() as stack:
            readers = [(headed, reader or _Prompts(headed, prompts))]
            if mixture is not None:
                readers.append((mixture.headed, _Prompts(mixture.headed, prompts)))
            for one, _ in readers:
                stack.enter_context(packed_linears(one.model))
            num_bytes = [bytes_per_slot_token(one) for one, _ in readers]
            if None not in num_bytes:
                slots = _slot_sizes(headed, rows, max_tokens_per_batch, sum(filter(None, num_bytes)))
                models = [_SlotModel(one, its_reader, SlotCache(*slots)) for one, its_reader in readers]
                steps = _decode_in_slots(models, rows, rule, max_tokens_per_batch, mixture.share if mixture else 0.0)
            elif mixture is not None:
                raise _no_mixture(readers[num_bytes.index(None)][0])
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


def _no_mixture(headed: HeadedModel) -> ConfigError:
    return ConfigError(
        f"cannot draw tokens from two models of which one is of type {headed.model.config.model_type!r}",
        why="both must have a key-value cache whose columns have no place of their own",
        fix="draw from the student alone (kd_method.teacher_mix=0)",
    )


def _slot_sizes(
    headed: HeadedModel, rows: Sequence[Sequence[DecodedRow]], max_tokens: int, bytes_per_token: int
) -> tuple[int, int]:
    """As many slots as the budget allows and the rows need, one prompt's rows at least; and the tokens of each."""
    every = [row for its_rows in rows for row in its_rows]
    capacity = max((len(row.prompt) + row.limit for row in every), default=1)
    num_tokens = max(_LITTLE_MEMORY // bytes_per_token, _CACHED_TOKENS * max_tokens)
    num_slots = min(num_tokens, _MOST_CACHED_TOKENS * max_tokens) // capacity
    if headed.model.device.type == "cpu":
        num_slots = min(num_slots, _MOST_ROWS_ON_CPU)
    most_answers = max((len(its_rows) for its_rows in rows), default=0)
    return min(max(num_slots, most_answers), len(every)), capacity


@dataclass(frozen=True, slots=True)
class _SlotModel:
    """A model whose rows are in the slots of a cache; of a mixture, both have the same row in the same slot."""

    headed: HeadedModel
    reader: PromptReader
    slots: SlotCache

    def enter(self, group: Sequence[int], sources: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Reads a group of prompts and puts rows into slots, row i from prompt sources[i]; their logits [R, V]."""
        cache = DynamicCache(config=self.headed.model.config.get_text_config(decoder=True))
        logits_PV: Tensor = self.headed.head(self.reader.read(group, cache))
        self.slots.enter(cache, sources, lengths)
        return logits_PV[torch.tensor(sources, device=logits_PV.device)]

    def step(self, inputs: Sequence[int]) -> Tensor:
        """Reads one more token a row; the logits of the next [R, V]."""
        logits_RV: Tensor = self.headed.head(self.slots.step(self.headed, inputs))
        return logits_RV


def _decode_in_slots(
    models: Sequence[_SlotModel],
    rows: Sequence[Sequence[DecodedRow]],
    rule: DecodingRule,
    max_tokens: int,
    share: float,
) -> Iterator[int]:
    """Decodes the rows of all prompts by one model, or by two of which the second has a `share` in every draw.

    Yields how many finish, step by step. The longest prompts go first, so that memory runs out at once or never.
    """
    slots, reader = models[0].slots, models[0].reader
    answered = [prompt for prompt, its_rows in enumerate(rows) if its_rows]
    waiting = deque(sorted(answered, key=lambda prompt: (-reader.num_tokens(prompt), prompt)))
    most_answers = max((len(its_rows) for its_rows in rows), default=0)
    live: list[DecodedRow] = []  # live[i] is in slot i
    inputs: list[int] = []  # their tokens that have not been read
    enough = max(most_answers, int(_REFILL_ABOVE * slots.num_slots))  # free slots that call for new rows
    while waiting or live:
        while waiting and (not live or slots.num_slots - len(live) >= enough):
            group = _take_group(waiting, rows, reader, max_tokens, slots.num_slots - len(live))
            entering = [row for prompt in group for row in rows[prompt]]
            sources = [place for place, prompt in enumerate(group) for _ in rows[prompt]]
            lengths = [len(row.prompt) for row in entering]
            inputs += rule.next_tokens([one.enter(group, sources, lengths) for one in models], entering, share)
            live += entering
            yield _let_go(live, inputs, models)
        if live:
            inputs = rule.next_tokens([one.step(inputs) for one in models], live, share)
            yield _let_go(live, inputs, models)


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


def _let_go(live: list[DecodedRow], inputs: list[int], models: Sequence[_SlotModel]) -> int:
    """Takes the rows that are done out of the slots and both lists; returns their number."""
    done = [slot for slot, row in enumerate(live) if row.done]
    for slot in reversed(done):  # from the end: the last row, which moves into the gap, is not done
        for model in models:
            model.slots.leave(slot)
        live[slot], inputs[slot] = live[-1], inputs[-1]
        live.pop()
        inputs.pop()
    return len(done)
