"""An answer on its way, and the rule by which it gets its next token.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pocl_cli.models.sampling import NoRepeatNgrams, ban_, choose, mix, uniforms

if TYPE_CHECKING:
    from pocl_cli.schema import DecodingConfig


@dataclass(slots=True)
class DecodedRow:
    """A row that is being decoded: the prompt that it continues, its stream of draws, and its tokens so far.

    Attributes:
        prompt: token ids; several rows may continue one prompt, each with a seed of its own.
        limit: largest number of new tokens.
        tokens: the new tokens so far, without EOS.
        end_token: the EOS that has come.
    """

    prompt: Sequence[int]
    seed: int
    limit: int
    ngrams: NoRepeatNgrams | None
    tokens: list[int] = field(default_factory=list)
    end_token: int | None = None

    @property
    def done(self) -> bool:
        return self.end_token is not None or len(self.tokens) >= self.limit

    def banned(self) -> Sequence[int]:
        """The tokens that the no-repeat rule forbids next."""
        return () if self.ngrams is None else self.ngrams.banned()

    def take(self, token: int, eos_token_ids: frozenset[int]) -> None:
        """Adds the row's next token; EOS ends it and is not kept."""
        if token in eos_token_ids:
            self.end_token = token
            return
        self.tokens.append(token)
        if self.ngrams is not None:
            self.ngrams.append(token)


@dataclass(frozen=True, slots=True)
class DecodingRule:
    """From logits to the rows' next tokens. `vocabulary_size`: logits from there on are of no tokens; None: all are."""

    decoding: DecodingConfig
    eos_token_ids: frozenset[int]
    vocabulary_size: int | None

    def next_tokens(self, logits: Sequence[Tensor], rows: Sequence[DecodedRow], share: float = 0.0) -> list[int]:
        """The next token of each row, none of which is done; each takes it.

        Args:
            logits: [R, V] of one model, or of two that have tokens drawn from them together; changed in place.
            rows: R of them.
            share: the second model's of the probabilities.
        """
        logits_RV, *others = (one_RV[:, : self.vocabulary_size] for one_RV in logits)
        for other_RV in others:
            logits_RV = mix(logits_RV, other_RV, share, self.decoding.sampling_temperature)
        if self.decoding.no_repeat_ngram_size:
            ban_(logits_RV, [row.banned() for row in rows])
        draws_R = uniforms([row.seed for row in rows], [len(row.tokens) for row in rows])
        tokens = choose(logits_RV, self.decoding, draws_R)
        for row, token in zip(rows, tokens, strict=True):
            row.take(token, self.eos_token_ids)
        return tokens
