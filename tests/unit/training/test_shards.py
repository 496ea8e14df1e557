"""Shards and their batches depend on the rows alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocl_cli.records import TokenisedRow
from pocl_cli.training.shards import SHARD_ROWS, TOKENS_PER_BATCH, in_shards, shard_batches, shard_hash

from ...support.training import RowsById, toy_rows


def test_shards_when_the_rows_come_in_another_order_then_are_the_same() -> None:
    rows = toy_rows(300)

    shards = in_shards(RowsById(rows))

    assert in_shards(RowsById(rows[::-1])) == shards
    assert [len(shard) for shard in shards] == [SHARD_ROWS, SHARD_ROWS, 300 - 2 * SHARD_ROWS]
    assert sorted(row_id for shard in shards for row_id in shard) == sorted(row.id for row in rows)
    lengths = [RowsById(rows).num_tokens(row_id) for shard in shards for row_id in shard]
    assert lengths == sorted(lengths)


def test_batches_when_joined_then_are_the_shard_in_its_order() -> None:
    rows = RowsById(toy_rows(300))
    for ids in in_shards(rows):
        shard = [rows.row(row_id) for row_id in ids]

        batches = shard_batches(shard)

        assert [row.id for batch in batches for row in batch] == list(ids)
        assert all(len(batch) * batch[-1].num_tokens <= TOKENS_PER_BATCH for batch in batches)


def test_batches_when_a_row_is_longer_than_the_budget_then_it_is_alone() -> None:
    long = TokenisedRow("long", [1] * TOKENS_PER_BATCH, [2, 3])

    assert [[row.id for row in batch] for batch in shard_batches([toy_rows(1)[0], long])] == [["r00"], ["long"]]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "other"},
        {"prompt_ids": [5, 7]},
        {"response_ids": [8, 10]},
        {"prompt_ids": [5, 6, 8], "response_ids": [9]},
    ],
    ids=["id", "prompt", "response", "border"],
)
def test_hash_when_anything_of_a_row_changes_then_is_another(change: dict[str, object]) -> None:
    row = TokenisedRow("a", [5, 6], [8, 9])

    assert shard_hash([replace(row, **change)]) != shard_hash([row])  # type: ignore[arg-type]
    assert shard_hash([replace(row)]) == shard_hash([row])
