"""The training rows of a chain as every step sees them: loaded, split, tokenised once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_cli.data.sources import load_dataset
from pocl_cli.data.split import split_dev
from pocl_cli.data.tokenise import TokenisedDataset, tokenise, tokenizer_hash
from pocl_cli.errors import DataError
from pocl_cli.log import get_logger
from pocl_cli.records import DroppedRow, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_cli.schema import DatasetConfig, PoclConfig


@dataclass(frozen=True)
class TrainingRows:
    """The rows that are trained on and the dev rows beside them; `records` holds both by id."""

    train: TokenisedDataset
    dev: TokenisedDataset | None
    records: dict[str, Record]
    dropped: tuple[DroppedRow, ...]


def training_rows(config: PoclConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingRows:
    """Loads `config.dataset`, sets the dev rows apart and tokenises both. Raises DataError where nothing is left."""
    loaded = load_dataset(config.dataset)
    train, dev = split_dev(loaded.records, config.dataset.dev_size, config.dataset.seed)
    tokenised = tokenised_rows(train, tokenizer, config.dataset, config.paths.outputs)
    dropped = (*loaded.dropped, *tokenised.dropped)
    dev_rows = tokenised_rows(dev, tokenizer, config.dataset, config.paths.outputs) if dev else None
    _report(config.dataset.name, tokenised, dropped, dev_rows)
    return TrainingRows(tokenised, dev_rows, {record.id: record for record in loaded.records}, dropped)


def tokenised_rows(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig, outputs: str
) -> TokenisedDataset:
    """`records` as token ids, from the cache below `outputs` where they have been tokenised before."""
    tokenised = tokenise(records, tokenizer, config, Path(outputs) / ".cache" / "tokenised", tokenizer_hash(tokenizer))
    if not len(tokenised):
        raise DataError(
            "no row is left after tokenising",
            where=config.name,
            why=str(tokenised.summary()),
            fix="raise dataset.max_prompt_tokens, or set dataset.long_prompts=cut",
        )
    return tokenised


def _report(name: str, train: TokenisedDataset, dropped: Sequence[DroppedRow], dev: TokenisedDataset | None) -> None:
    level = logging.INFO if dropped or train.num_prompt_cut or train.num_response_cut else logging.DEBUG
    get_logger().log(
        level,
        "%s: %d training rows, %d dev rows; %d dropped, %d prompts and %d responses cut",
        name,
        len(train),
        len(dev) if dev else 0,
        len(dropped),
        train.num_prompt_cut,
        train.num_response_cut,
    )
