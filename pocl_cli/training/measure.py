"""Cross entropy of given responses under a model, row by row; alone, or in one pass with the model's own answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from pocl_cli import faults
from pocl_cli.errors import NonFiniteError
from pocl_cli.models.generate import Generated, generate
from pocl_cli.records import ScoredRecord, TokenisedRow
from pocl_cli.training.objective import collate, cross_entropy_per_token, tokens_per_chunk
from pocl_cli.training.sampler import micro_batches

if TYPE_CHECKING:
    from pocl_cli.models.device import Hardware
    from pocl_cli.models.head import HeadedModel
    from pocl_cli.schema import DecodingConfig


@torch.no_grad()
def measure_cross_entropy(
    headed: HeadedModel,
    rows: Sequence[TokenisedRow],
    *,
    num_real_tokens: int,
    hardware: Hardware,
    advance: Callable[[int], None] | None = None,
) -> list[ScoredRecord]:
    """The cross entropy of each row's response given its prompt, in nats per response token (EOS counts), in order.

    The model is in evaluation mode meanwhile.
    """
    was_training = headed.training
    headed.eval()
    reader = _ScoringReader(headed, rows, num_real_tokens, hardware)
    place = {row.id: number for number, row in enumerate(rows)}
    for group in micro_batches(rows, hardware.max_tokens_per_micro_batch, packs=headed.packs):
        reader.read([place[row.id] for row in group])
        if advance is not None:
            advance(len(group))
    headed.train(was_training)
    return reader.measured


@torch.no_grad()
def measure_and_generate(
    headed: HeadedModel,
    rows: Sequence[TokenisedRow],
    *,
    seeds: Sequence[Sequence[int]],
    decoding: DecodingConfig,
    eos_token_ids: Collection[int],
    context_length: int | None,
    num_real_tokens: int,
    pad_token_id: int,
    hardware: Hardware,
    on_finished: Callable[[int], None] | None = None,
) -> tuple[list[ScoredRecord], list[list[Generated]]]:
    """`measure_cross_entropy` of the rows and `generate` from their prompts; prompt and response are read in one pass.

    The prompt's keys and values then serve the answers. Where the model cannot be decoded in slots, it reads twice.

    Raises NonFiniteError, which names records, where a response's cross entropy or an answer's logits are not finite.
    """
    reader = _ScoringReader(headed, rows, num_real_tokens, hardware)
    with hardware.autocast(), records_named(rows):
        answers = generate(
            headed,
            [row.prompt_ids for row in rows],
            seeds=seeds,
            decoding=decoding,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            max_tokens_per_batch=hardware.max_tokens_per_micro_batch,
            context_length=context_length,
            vocabulary_size=num_real_tokens,
            reader=reader,
            on_finished=on_finished,
        )
    if reader.is_complete:
        return reader.measured, answers
    measured = measure_cross_entropy(headed, rows, num_real_tokens=num_real_tokens, hardware=hardware)
    return measured, answers


@contextmanager
def records_named(rows: Sequence[TokenisedRow]) -> Iterator[None]:
    """Says of what generation refuses whose answers it was making."""
    try:
        yield
    except NonFiniteError as error:
        if error.where is not None:
            raise
        raise NonFiniteError(error.what, where=_shown(rows), why=error.why, fix=error.fix) from error


def _shown(rows: Sequence[TokenisedRow]) -> str:
    return f"records {', '.join(row.id for row in rows[:5])}{', …' if len(rows) > 5 else ''}"


class _ScoringReader:
    """Reads prompts with their responses, and keeps the cross entropy of each response."""

    def __init__(
        self,
        headed: HeadedModel,
        rows: Sequence[TokenisedRow],
        num_real_tokens: int,
        hardware: Hardware,
    ) -> None:
        self._headed, self._rows, self._hardware = headed, rows, hardware
        self._num_real_tokens = num_real_tokens
        self._measured: dict[int, ScoredRecord] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every row has been read."""
        return len(self._measured) == len(self._rows)

    @property
    def measured(self) -> list[ScoredRecord]:
        """The cross entropy of every row, in order."""
        return [self._measured[number] for number in range(len(self._rows))]

    def num_tokens(self, prompt: int) -> int:
        return self._rows[prompt].num_tokens

    def read(self, prompts: Sequence[int], cache: Cache | None = None) -> Tensor:
        """Measures these rows; returns the states that their responses' first tokens come from."""
        group = [self._rows[number] for number in prompts]
        faults.reached("measure", group[0].id)
        batch = collate(group).to(self._hardware.device)
        with self._hardware.autocast():
            hidden_ND = self._headed.hidden_states(batch, cache)
            ce_N = cross_entropy_per_token(
                hidden_ND,
                self._headed.head,
                batch.targets_N,
                num_real_tokens=self._num_real_tokens,
                chunk_tokens=tokens_per_chunk(
                    self._headed.num_logits, self._hardware.objective_memory_mb, self._hardware.device
                ),
            )
        lengths = [len(row.response_ids) for row in group]
        for number, row, ce_n in zip(prompts, group, ce_N.cpu().double().split(lengths), strict=True):
            self._measured[number] = ScoredRecord(
                row.id, len(row.prompt_ids), len(row.response_ids), float(ce_n.mean())
            )
        bad = [self._rows[number] for number in prompts if not math.isfinite(self._measured[number].cross_entropy)]
        if bad:
            raise NonFiniteError(
                "the cross entropy of a response is not finite",
                where=_shown(bad),
                why="the model's weights or its precision give NaN or infinity",
                fix="check the model's weights, or use float32: its dtype, and hardware.precision",
            )
        firsts = torch.tensor([0, *lengths[:-1]], device=hidden_ND.device).cumsum(dim=0)
        return hidden_ND[firsts]
