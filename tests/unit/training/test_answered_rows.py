"""Rows with answers in place of their responses."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pocl_cli.training.answered_rows import AnsweredRows

from ...support.training import RowsById, toy_rows

EOS = 2


def answered(gold, token_ids, ended):
    lists = pa.chunked_array(
        [pa.array(token_ids[:1], pa.list_(pa.int32())), pa.array(token_ids[1:], pa.list_(pa.int32()))]
    )
    return AnsweredRows(gold, lists, pa.chunked_array([pa.array(ended)]), eos_id=EOS)


def test_row_when_its_answer_ended_then_eos_follows_and_where_it_was_cut_none():
    gold = RowsById(toy_rows(3))
    rows = answered(gold, [[5, 6], [], [7]], [True, True, False])

    found = [rows.row(row_id) for row_id in rows.ids]

    assert [row.response_ids for row in found] == [[5, 6, EOS], [EOS], [7]]
    assert [row.response_cut for row in found] == [False, False, True]
    assert [row.prompt_ids for row in found] == [gold.row(row_id).prompt_ids for row_id in gold.ids]
    assert [rows.num_tokens(row_id) for row_id in rows.ids] == [row.num_tokens for row in found]


def test_rows_when_an_empty_answer_was_cut_then_are_refused():
    with pytest.raises(AssertionError, match="ended by itself"):
        answered(RowsById(toy_rows(2)), [[5], []], [True, False])
