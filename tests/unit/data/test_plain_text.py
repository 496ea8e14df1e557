"""Plain text: documents of files, and their token ids."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
from pathlib import Path

import pytest

from pocl_cli.data.plain_text import TextEncoder
from pocl_cli.data.sources import dataset_identity, load_dataset
from pocl_cli.data.tokenise import tokenise, tokenizer_hash
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import DroppedRow, Record, TokenisedRow, record_of


def document(text: str) -> Record:
    return Record("id", "", "", (text,))


def rows_of(encoder: TextEncoder, text: str) -> list[TokenisedRow]:
    rows = encoder.encode_batch([document(text)])
    return [row for row in rows if isinstance(row, TokenisedRow)]


def test_document_when_short_then_every_token_but_the_first_is_the_response(tokenizer) -> None:
    text = "The quick brown fox."
    (row,) = rows_of(TextEncoder(tokenizer, 512, "cut"), text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (list(row.prompt_ids), list(row.response_ids)) == (ids[:1], [*ids[1:], tokenizer.eos_token_id])
    assert not row.response_cut


@pytest.mark.parametrize("max_tokens", [2, 3, 7, 8, 9, 40])
def test_document_when_cut_then_each_token_but_the_first_is_predicted_once_in_order(tokenizer, max_tokens: int) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = rows_of(TextEncoder(tokenizer, max_tokens, "cut"), text)
    assert [token for row in rows for token in row.response_ids] == ids[1:]
    read = [[*row.prompt_ids, *row.response_ids] for row in rows]
    assert all(len(row) <= max_tokens for row in read)
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(read))
    assert [row.response_cut for row in rows] == [True] * (len(rows) - 1) + [False]
    assert [row.id for row in rows] == ["id", *(f"id.{number}" for number in range(2, len(rows) + 1))]
    assert {record_of(row.id) for row in rows} == {"id"}


def test_document_when_longer_ones_are_dropped_then_goes_with_the_limit(tokenizer) -> None:
    text = "The quick brown fox"
    num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    assert len(rows_of(TextEncoder(tokenizer, num_tokens, "drop"), text)) == 1
    (row,) = TextEncoder(tokenizer, num_tokens - 1, "drop").encode_batch([document(text)])
    assert row == DroppedRow("record id", f"document longer than {num_tokens - 1} tokens", "id")


def test_document_when_it_names_a_special_token_then_that_is_text(tokenizer) -> None:
    (row,) = rows_of(TextEncoder(tokenizer, 512, "cut"), "a <|endoftext|> b")
    assert list(row.response_ids).count(tokenizer.eos_token_id) == 1


def test_text_file_when_read_then_blank_lines_separate_documents(make_config, tmp_path: Path) -> None:
    content = "\ufeff\n\nFirst line.\r\nSecond line.\n \n\nAnother one.\n"
    for name, packed in (("corpus.txt", content.encode()), ("corpus.txt.gz", gzip.compress(content.encode()))):
        (tmp_path / name).write_bytes(packed)
        loaded = load_dataset(make_config(path=str(tmp_path / name), format="text"))
        assert [record.response for record in loaded.records] == ["First line.\r\nSecond line.", "Another one."]
        assert [record.beginning for record in loaded.records] == ["First line.\r\nSecond line.", "Another one."]


def test_text_file_when_it_is_not_utf8_then_the_error_names_the_line(make_config, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(b"good\n\nb\xffd\n")
    with pytest.raises(DataError, match=r"not UTF-8 in .*corpus\.txt:3"):
        load_dataset(make_config(path=str(tmp_path / "corpus.txt"), format="text"))


def test_text_file_when_read_as_instructions_then_the_error_names_the_format(make_config, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("A document.\n")
    with pytest.raises(DataError, match=r"dataset\.format=text"):
        load_dataset(make_config(path=str(tmp_path / "corpus.txt")))


def test_text_rows_when_columns_have_the_text_then_blank_ones_are_dropped(make_config, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "One.", "topic": "x"}, {"text": " "}, {"text": "Three."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_dataset(make_config(path=str(path), format="text"))
    assert [(record.response, record.category) for record in loaded.records] == [("One.", "x"), ("Three.", None)]
    assert loaded.dropped == (DroppedRow("rows.jsonl:2", "empty text"),)


def test_text_rows_when_the_column_has_another_name_then_it_can_be_named(make_config, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "One."}\n{"body": 2}\n')
    with pytest.raises(DataError, match=r"no column for the text in .*rows\.jsonl:1 .*dataset\.fields\.output=body"):
        load_dataset(make_config(path=str(path), format="text"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        load_dataset(make_config(path=str(path), format="text", fields={"output": "body"}))


def test_folder_when_a_note_lies_beside_the_rows_then_the_rows_are_read(make_config, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Q", "output": "A"}\n')
    (tmp_path / "train_licence.txt").write_text("A licence.\n")
    assert len(load_dataset(make_config(path=str(tmp_path))).records) == 1


def test_identity_when_rows_are_text_then_holds_what_decides_their_tokens(make_config, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A document.\n")
    common = {"path": str(tmp_path / "a.txt"), "format": "text"}
    first = dataset_identity(make_config(**common))
    assert first == dataset_identity(make_config(**common, max_prompt_tokens=5, long_prompts="drop"))
    assert first != dataset_identity(make_config(**common, long_documents="drop"))
    assert "format" not in dataset_identity(make_config(path=str(tmp_path / "a.txt")))


def test_tokens_when_documents_are_in_pieces_then_the_cache_gives_them_again(
    make_config, tokenizer, tmp_path: Path
) -> None:
    config = make_config(path="x", format="text", max_tokens=5)
    records = [document("The quick brown fox jumps over the lazy dog")]
    first, second = (
        tokenise(records, tokenizer, config, tmp_path / "cache", tokenizer_hash(tokenizer)) for _ in range(2)
    )
    assert len(first) > 1
    assert [first.row(one) for one in first.ids] == [second.row(one) for one in second.ids]
    longer = tokenise(records, tokenizer, make_config(path="x", format="text"), tmp_path / "cache", "same")
    assert len(longer) == 1


def test_encoder_when_the_tokenizer_has_no_eos_then_is_a_configuration_error(tokenizer) -> None:
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        TextEncoder(without, 512, "cut")
