"""Rows with answers in place of their responses."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pocl_cli.training.answered_rows import AnsweredRows, Together

from ...support.training import RowsById, toy_rows

EOS = 2


def answered(gold, token_ids, ended, who="teacher"):
    lists = pa.chunked_array(
        [pa.array(token_ids[:1], pa.list_(pa.int32())), pa.array(token_ids[1:], pa.list_(pa.int32()))]
    )
    return AnsweredRows(who, gold, lists, pa.chunked_array([pa.array(ended)]), eos_id=EOS)


def test_row_when_its_answer_ended_then_eos_follows_and_where_it_was_cut_none():
    gold = RowsById(toy_rows(3))
    rows = answered(gold, [[5, 6], [], [7]], [True, True, False])

    found = [rows.row(row_id) for row_id in gold.ids]

    assert [row.response_ids for row in found] == [[5, 6, EOS], [EOS], [7]]
    assert [row.response_cut for row in found] == [False, False, True]
    assert [row.prompt_ids for row in found] == [gold.row(row_id).prompt_ids for row_id in gold.ids]
    assert tuple(row.id for row in found) == rows.ids == tuple(f"{row_id}@teacher" for row_id in gold.ids)


def test_together_when_asked_by_the_ids_of_answered_rows_then_gives_each_models_own():
    gold = RowsById(toy_rows(2))
    both = {
        "teacher": answered(gold, [[5], [6]], [True, True]),
        "student": answered(gold, [[7], [8, 9]], [True, False], "student"),
    }

    together = Together(both)

    assert len(together.ids) == 4 == len(set(together.ids))
    assert [together.row(row_id).response_ids for row_id in together.ids] == [[5, EOS], [6, EOS], [7, EOS], [8, 9]]
    assert [together.row(row_id).id for row_id in together.ids] == list(together.ids)
    assert [together.num_tokens(row_id) for row_id in together.ids] == [
        together.row(row_id).num_tokens for row_id in together.ids
    ]


def test_rows_when_an_empty_answer_was_cut_then_are_refused():
    with pytest.raises(AssertionError, match="ended by itself"):
        answered(RowsById(toy_rows(2)), [[5], []], [True, False])
