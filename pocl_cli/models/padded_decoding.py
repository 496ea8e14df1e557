"""Decoding in batches that are padded on the left: for caches whose columns have their place in a row.

Sliding windows and recurrent states are of that kind. A batch is decoded to its end; rows that are done leave it.

Shapes: R rows, T new input tokens, C columns of the cache, padding included (on the left), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pocl_cli.errors import ConfigError
from pocl_cli.models.decoded_row import DecodedRow, DecodingRule

_DROP_BELOW = 0.875  # done rows leave once they are an eighth of the batch: each departure copies the cache


def decode_padded(
    model: PreTrainedModel,
    rows: Sequence[DecodedRow],
    rule: DecodingRule,
    *,
    pad_token_id: int,
    context_length: int | None,
    max_tokens: int,
) -> Iterator[int]:
    """Decodes all rows; yields how many finish, step by step.

    Rows × (longest prompt + longest answer) of a batch stays within `max_tokens`; one row always goes. The longest
    prompts go first, so that memory runs out at once or never.

    Raises:
        ConfigError: the model has no cache that can be decoded with.
    """
    call = _Call(model, context_length)
    waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
    while waiting:
        batch = _PaddedBatch(_take_batch(waiting, context_length, max_tokens), model, pad_token_id)
        while batch.going:
            going = batch.going
            logits_RV = call.logits(batch)[torch.tensor(going, device=model.device)]
            batch.advance(going, rule.next_tokens([logits_RV], [batch.rows[place] for place in going]))
            yield len(going) - len(batch.going)
            if 0 < len(batch.going) < _DROP_BELOW * len(batch.rows):
                batch.drop_done()


def _take_batch(waiting: deque[DecodedRow], context_length: int | None, max_tokens: int) -> list[DecodedRow]:
    """The next rows that fit the budget, and whose columns, padding included, fit the context; one at least."""
    taken = [waiting.popleft()]
    longest = len(taken[0].prompt)
    while waiting:
        num_columns = longest + waiting[0].limit
        if context_length is not None and num_columns > context_length:
            break
        if (len(taken) + 1) * num_columns > max_tokens:
            break
        taken.append(waiting.popleft())
    return taken


class _PaddedBatch:
    """Rows that are padded on the left to one length. New: their prompts are the next input, and the cache is empty.

    Row r's padding is `padding[r]` columns; column c of it has position c - padding[r].
    """

    def __init__(self, rows: list[DecodedRow], model: PreTrainedModel, pad_token_id: int) -> None:
        self.rows, self._device = rows, model.device
        longest = max(len(row.prompt) for row in rows)
        padding = [longest - len(row.prompt) for row in rows]
        padded = [[pad_token_id] * pad + list(row.prompt) for row, pad in zip(rows, padding, strict=True)]
        self._padding_R1 = torch.tensor(padding, device=self._device).unsqueeze(-1)
        self.input_ids_RT = torch.tensor(padded, device=self._device)
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.num_cached = 0  # columns in the cache

    @property
    def going(self) -> list[int]:
        """The places of the rows that are not done."""
        return [place for place, row in enumerate(self.rows) if not row.done]

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for tokens, 0 for padding, [R, C + T]; None where there is no padding."""
        if not bool(self._padding_R1.any()):
            return None
        columns = torch.arange(self.num_cached + self.input_ids_RT.shape[1], device=self._device)
        return (columns >= self._padding_R1).long()

    @property
    def position_ids(self) -> Tensor:
        """The position of each input token in its row, [R, T]; negative in padding."""
        columns = torch.arange(self.num_cached, self.num_cached + self.input_ids_RT.shape[1], device=self._device)
        return columns - self._padding_R1

    def advance(self, going: Sequence[int], tokens: Sequence[int]) -> None:
        """After a forward pass: makes `tokens`, one for each row that was going, the next input."""
        self.num_cached += self.input_ids_RT.shape[1]
        inputs = [0] * len(self.rows)  # a row that is done reads anything until it leaves
        for place, token in zip(going, tokens, strict=True):
            inputs[place] = token
        self.input_ids_RT = torch.tensor(inputs, device=self._device).unsqueeze(-1)

    def drop_done(self) -> None:
        """Takes the rows that are done out of the batch. One row at least must not be done."""
        index = torch.tensor(self.going, device=self._device)
        self.rows = [self.rows[place] for place in self.going]
        self._padding_R1, self.input_ids_RT = self._padding_R1[index], self.input_ids_RT[index]
        # batch_select_indices is missing from caches of linear attention
        self.cache.reorder_cache(cast(torch.LongTensor, index))


class _Call:
    """How the model's forward is called. Raises ConfigError where its state is kept elsewhere than in a cache."""

    def __init__(self, model: PreTrainedModel, context_length: int | None) -> None:
        self._model = model
        self._last_position = None if context_length is None else context_length - 1
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        names = [name for name in ("past_key_values", "cache_params") if name in self._arguments]
        supports_cache: Any = model._supports_default_dynamic_cache
        if not names or not supports_cache() or any(hasattr(part, "_setup_cache") for part in model.children()):
            raise ConfigError(
                f"cannot generate with a model of type {model.config.model_type!r}",
                why="it has no cache, or one of its own that a changing batch would spoil",
                fix="choose an architecture with a key-value cache (gpt2, opt, llama, qwen2, …)",
            )
        self._cache_name = names[0]

    def logits(self, batch: _PaddedBatch) -> Tensor:
        """Logits of each row's next token, [R, V]."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids_RT,
            "attention_mask": batch.attention_mask,
            "use_cache": True,
            self._cache_name: batch.cache,
        }
        if self._cache_name == "cache_params" and batch.num_cached:
            inputs["attention_mask"] = None  # a recurrent state holds no padding
        if "position_ids" in self._arguments:  # GPT-2 counts padding as positions unless told otherwise
            # above, the clamp is for rows that ended where the context ends and have not left yet
            inputs["position_ids"] = batch.position_ids.clamp(min=0, max=self._last_position)
        if "logits_to_keep" in self._arguments:
            inputs["logits_to_keep"] = 1
        forward: Any = self._model
        logits_RV: Tensor = forward(**inputs).logits[:, -1]
        return logits_RV
