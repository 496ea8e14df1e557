"""The training rows of a chain as every step sees them: loaded, split, tokenised once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_cli.data.dropped import reasons_text
from pocl_cli.data.sources import load_dataset
from pocl_cli.data.split import split_dev
from pocl_cli.data.tokenise import TokenisedDataset, tokenise, tokenizer_hash
from pocl_cli.errors import DataError
from pocl_cli.log import get_logger
from pocl_cli.records import DroppedRow, Record, record_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_cli.schema import DatasetConfig, PoclConfig


@dataclass(frozen=True)
class TrainingRows:
    """The rows that are trained on and the dev rows beside them; `records` holds those that both are from, by row."""

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
    tell_losses(f"{config.dataset.name}, training", tokenised, dropped, config.dataset)
    dev_rows = None
    if dev:
        dev_rows = tokenised_rows(dev, tokenizer, config.dataset, config.paths.outputs)
        tell_losses(f"{config.dataset.name}, dev", dev_rows, dev_rows.dropped, config.dataset)
        dropped = (*dropped, *dev_rows.dropped)
    ids = [*tokenised.ids, *(dev_rows.ids if dev_rows else ())]
    return TrainingRows(tokenised, dev_rows, records_by_row(loaded.records, ids), dropped)


def records_by_row(records: Sequence[Record], row_ids: Iterable[str]) -> dict[str, Record]:
    """The record that each row is from."""
    by_id = {record.id: record for record in records}
    return {row_id: by_id[record_of(row_id)] for row_id in row_ids}


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
            fix="raise the limits on tokens of dataset, or let it cut what is longer",
        )
    return tokenised


def tell_losses(what: str, rows: TokenisedDataset, dropped: Sequence[DroppedRow], config: DatasetConfig) -> None:
    """Logs how many rows there are (`what` names them), and which were dropped or cut; a quiet line where none was."""
    lost = bool(dropped or rows.num_prompt_cut or rows.num_response_cut)
    if config.has_prompts:
        cut = f"{rows.num_prompt_cut} prompts and {rows.num_response_cut} responses cut"
    else:
        num_documents = len({record_of(row_id) for row_id in rows.ids})
        num_cut = len({record_of(row_id) for row_id in rows.ids if rows.row(row_id).response_cut})
        cut = f"from {num_documents} documents, of which {num_cut} are cut into pieces"
    get_logger().log(
        logging.INFO if lost else logging.DEBUG,
        "%s: %d rows; %d dropped%s, %s",
        what,
        len(rows),
        len(dropped),
        f" ({reasons_text(dropped)})" if dropped else "",
        cut,
    )
