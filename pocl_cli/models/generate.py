"""Decoding: one loop with a key-value cache, whose tokens do not depend on how the rows are batched.

Shapes: R rows of a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl_cli import faults
from pocl_cli.errors import ConfigError
from pocl_cli.models.decoding_batch import DecodedRow, DecodingBatch
from pocl_cli.models.sampling import NoRepeatNgrams, ban, choose, uniforms

if TYPE_CHECKING:
    from pocl_cli.schema import DecodingConfig

_DROP_BELOW = 0.875  # done rows leave once they are an eighth of the batch: each departure copies the cache
_REFILL_BELOW = 0.5  # new rows come once half of the places are free: a step costs nearly as much for few rows


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated answer: `token_ids` without EOS; `ended` is False where a length limit cut it."""

    token_ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    decoding: DecodingConfig,
    eos_token_ids: Collection[int],
    pad_token_id: int,
    max_tokens_per_batch: int,
    context_length: int | None,
    vocabulary_size: int | None = None,
    on_finished: Callable[[int], None] | None = None,
) -> list[Generated]:
    """An answer to each prompt, in input order.

    Rows are batched by length under a token budget and padded on the left; rows that end make place for others. Row i
    draws from the stream `seeds[i]` alone, so its tokens do not depend on the other rows, up to the rounding of the
    logits. The model is in evaluation mode meanwhile.

    Args:
        prompts: token ids of each prompt, without padding, at least one each.
        seeds: one seed a row, below 2^64 (see `sampling.row_seed`).
        eos_token_ids: tokens that end an answer; they are not part of it.
        max_tokens_per_batch: bound on rows × (longest prompt + longest answer) of a batch; one row always goes.
        context_length: positions that the model has; an answer is cut where they end. None: no limit.
        vocabulary_size: the tokenizer's number of tokens; embedding rows beyond it (padding) are never generated.
        on_finished: called with the number of rows finished so far, as they finish.

    Raises:
        ConfigError: a prompt fills the whole context, or the model has no cache that can be decoded with.
        NonFiniteError: the model gives a NaN or infinite logit.
    """
    decoder = _Decoder(model, decoding, frozenset(eos_token_ids), pad_token_id, context_length, vocabulary_size)
    rows = [decoder.row(*row) for row in zip(range(len(prompts)), seeds, prompts, strict=True)]
    was_training = model.training
    model.train(False)
    try:
        num_finished = 0
        for finished in decoder.run(rows, max_tokens_per_batch):
            num_finished += len(finished)
            if on_finished is not None:
                on_finished(num_finished)
    finally:
        model.train(was_training)
    return [Generated(tuple(row.tokens), row.ended) for row in rows]


def _cache_argument(model: PreTrainedModel, arguments: frozenset[str]) -> str:
    """The forward argument that takes a `DynamicCache`. Raises ConfigError where the state is kept elsewhere."""
    names = [name for name in ("past_key_values", "cache_params") if name in arguments]
    supports_cache: Any = model._supports_default_dynamic_cache
    if not names or not supports_cache() or any(hasattr(part, "_setup_cache") for part in model.children()):
        raise ConfigError(
            f"cannot generate with a model of type {model.config.model_type!r}",
            why="it has no cache, or one of its own that a changing batch would spoil",
            fix="choose an architecture with a key-value cache (gpt2, opt, llama, qwen2, …)",
        )
    return names[0]


def _merge(batches: list[DecodingBatch]) -> DecodingBatch | None:
    """The live batch and the admitted one, where there are both, as one; rows that are done leave when it pays."""
    for batch in batches:
        if len(batches) > 1 or batch.num_going < _DROP_BELOW * len(batch.rows):
            batch.drop_done()
    for other in batches[1:]:
        batches[0].join(other)
    return batches[0] if batches else None


class _Decoder:
    """What all batches of one call share: the model, how its forward is called, and the decoding rule."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoding: DecodingConfig,
        eos_token_ids: frozenset[int],
        pad_token_id: int,
        context_length: int | None,
        vocabulary_size: int | None,
    ) -> None:
        self.model, self.decoding, self.eos_token_ids = model, decoding, eos_token_ids
        self.pad_token_id, self.context_length, self.vocabulary_size = pad_token_id, context_length, vocabulary_size
        self.arguments = frozenset(inspect.signature(model.forward).parameters)
        self.cache_name = _cache_argument(model, self.arguments)

    def row(self, index: int, seed: int, prompt: Sequence[int]) -> DecodedRow:
        assert len(prompt) > 0, "a prompt without tokens"
        room = self.decoding.max_new_tokens if self.context_length is None else self.context_length - len(prompt)
        if room <= 0:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer",
                why=f"the model's context is {self.context_length} tokens",
                fix="lower dataset.max_prompt_tokens",
            )
        size = self.decoding.no_repeat_ngram_size
        ngrams = NoRepeatNgrams(size, prompt) if size else None
        return DecodedRow(index, seed, prompt, min(self.decoding.max_new_tokens, room), ngrams)

    def run(self, rows: Sequence[DecodedRow], budget: int) -> Iterator[list[DecodedRow]]:
        """Decodes all rows; yields those that finish, step by step.

        The longest prompts go first, so that memory runs out at once or never.
        """
        waiting = deque(sorted(rows, key=lambda row: (-len(row.prompt), row.index)))
        live: DecodingBatch | None = None
        while waiting or live is not None:
            admitted = self._admit(waiting, live, budget)
            finished = self._step(admitted or live)
            if finished:
                yield finished
            live = _merge([batch for batch in (live, admitted) if batch is not None and batch.num_going])

    def _admit(self, waiting: deque[DecodedRow], live: DecodingBatch | None, budget: int) -> DecodingBatch | None:
        """A batch of waiting rows to read the prompts of, where there is room for a good number of them."""
        if not waiting or (live is not None and not live.joinable):
            return None
        going = [] if live is None else [row for row in live.rows if not row.done]
        longest = max(row.most_tokens for row in [waiting[0], *going])
        if going and len(going) > _REFILL_BELOW * (budget // longest):
            return None
        taken: list[DecodedRow] = []
        while waiting and (not (going or taken) or (len(going) + len(taken) + 1) * longest <= budget):
            taken.append(waiting.popleft())
            if waiting:
                longest = max(longest, waiting[0].most_tokens)
        if not taken:
            return None
        return DecodingBatch(taken, self.model.config, device=self.model.device, pad_token_id=self.pad_token_id)

    def _step(self, batch: DecodingBatch | None) -> list[DecodedRow]:
        """One more token for every row of the batch; returns the rows that finish with it."""
        assert batch is not None, "where no batch is live, one is admitted"
        faults.reached("decode")
        logits_RV = self._forward(batch)
        if self.decoding.no_repeat_ngram_size:
            logits_RV = ban(logits_RV, [row.banned() for row in batch.rows])
        draws_R = uniforms([row.seed for row in batch.rows], [len(row.tokens) for row in batch.rows])
        tokens = choose(logits_RV, self.decoding, draws_R)
        going = [(row, token) for row, token in zip(batch.rows, tokens, strict=True) if not row.done]
        for row, token in going:
            row.take(token, self.eos_token_ids)
        batch.advance(tokens)
        return [row for row, _ in going if row.done]

    def _forward(self, batch: DecodingBatch) -> Tensor:
        """Logits of each row's next token, [R, V]."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": True,
            self.cache_name: batch.cache,
        }
        if self.cache_name == "cache_params" and batch.num_cached:
            inputs["attention_mask"] = None  # a recurrent state holds no padding
        if "position_ids" in self.arguments:  # GPT-2 counts padding as positions unless told otherwise
            # above, the clamp is for rows that ended where the context ends and have not left yet
            last = None if self.context_length is None else self.context_length - 1
            inputs["position_ids"] = batch.position_ids.clamp(min=0, max=last)
        if "logits_to_keep" in self.arguments:
            inputs["logits_to_keep"] = 1
        forward: Any = self.model
        logits_RV: Tensor = forward(**inputs).logits[:, -1, : self.vocabulary_size]
        return logits_RV
