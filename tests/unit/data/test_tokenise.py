"""The token cache of a data set."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pocl_cli.data.sources import record_id
from pocl_cli.data.template import RowEncoder
from pocl_cli.data.tokenise import TokenisedDataset, tokenise, tokenizer_hash
from pocl_cli.errors import DataError, ResourceError
from pocl_cli.records import Record, TokenisedRow


def make_records(num_rows: int) -> list[Record]:
    texts = [("Name " + "x " * (i % 7), "y " * (9 * i), "z " * (1 + i)) for i in range(num_rows)]
    return [Record(record_id(a, b, (c,)), a, b, (c,)) for a, b, c in texts]


@pytest.fixture
def config(make_config):
    return make_config(path="rows", max_tokens=300, max_prompt_tokens=200)


def run(records: list[Record], tokenizer, config, folder: Path) -> TokenisedDataset:
    return tokenise(records, tokenizer, config, folder, tokenizer_hash(tokenizer))


def test_dataset_when_tokenised_then_gives_each_record_its_encoding(tokenizer, config, tmp_path: Path) -> None:
    records = make_records(60)
    dataset = run(records, tokenizer, config, tmp_path)
    encoder = RowEncoder(tokenizer, 300, 200, "cut")
    expected = [encoder.encode(record) for record in records]
    assert [dataset.row(row_id) for row_id in dataset.ids] == expected
    assert dataset.ids == tuple(record.id for record in records)
    assert [dataset.num_tokens(row.id) for row in expected] == [row.num_tokens for row in expected]
    assert len(dataset) == 60


def test_dataset_when_rows_are_cut_then_counts_them(tokenizer, config, tmp_path: Path) -> None:
    dataset = run(make_records(60), tokenizer, config, tmp_path)
    rows = [dataset.row(row_id) for row_id in dataset.ids]
    assert dataset.num_prompt_cut == sum(row.prompt_cut for row in rows) > 0
    assert dataset.num_response_cut == sum(row.response_cut for row in rows)
    assert dataset.summary() == {
        "rows": 60,
        "prompt_cut": dataset.num_prompt_cut,
        "response_cut": dataset.num_response_cut,
        "dropped": 0,
    }


def test_dataset_when_long_prompts_are_dropped_then_counts_the_reason(tokenizer, config, tmp_path: Path) -> None:
    records = make_records(60)
    num_cut = run(records, tokenizer, config, tmp_path).num_prompt_cut
    dataset = run(records, tokenizer, config.model_copy(update={"long_prompts": "drop"}), tmp_path)
    assert len(dataset.dropped) == num_cut
    assert len(dataset) == 60 - num_cut
    assert dataset.summary()["dropped: prompt longer than 200 tokens"] == num_cut
    assert {row.id for row in dataset.dropped}.isdisjoint(dataset.ids)


def test_cache_when_asked_again_then_is_read_and_not_made(tokenizer, config, tmp_path: Path) -> None:
    records = make_records(20)
    first = run(records, tokenizer, config, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    # A tokenizer that can make nothing: what comes back can only be the cache's.
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    second = tokenise(records, broken, config, tmp_path, tokenizer_hash(tokenizer))
    assert [second.row(row_id) for row_id in second.ids] == [first.row(row_id) for row_id in first.ids]
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("change", [{"max_tokens": 301}, {"max_prompt_tokens": 199}, {"long_prompts": "drop"}])
def test_cache_when_a_limit_changes_then_is_another_file(tokenizer, config, tmp_path: Path, change) -> None:
    for each in (config, config.model_copy(update=change)):
        run(make_records(5), tokenizer, each, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_when_records_or_tokenizer_change_then_is_another_file(tokenizer, config, tmp_path: Path) -> None:
    records = make_records(5)
    run(records, tokenizer, config, tmp_path)
    run(records[:4], tokenizer, config, tmp_path)
    run(records[::-1], tokenizer, config, tmp_path)
    run(records, ByT5Tokenizer(), config, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_cache_when_truncated_then_is_made_again_and_says_so(tokenizer, config, tmp_path, caplog, size) -> None:
    records = make_records(20)
    first = run(records, tokenizer, config, tmp_path)
    expected = [first.row(row_id) for row_id in first.ids]
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: int(size * len(data)) if size == 0.5 else size])
    with caplog.at_level(logging.WARNING, "pocl"):
        again = run(records, tokenizer, config, tmp_path)
    assert [again.row(row_id) for row_id in again.ids] == expected
    assert file.read_bytes() == data
    assert "is damaged" in caplog.text


def test_cache_when_any_byte_of_the_ids_flips_then_is_made_again(tokenizer, config, tmp_path, caplog) -> None:
    records = make_records(20)
    first = run(records, tokenizer, config, tmp_path)
    row = first.row(first.ids[10])
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    place = data.index(b"".join(int(token).to_bytes(4, "little") for token in row.response_ids))
    data[place + 1] ^= 1
    file.unlink()
    file.write_bytes(data)
    again = run(records, tokenizer, config, tmp_path)
    assert again.row(row.id) == row
    assert "its checksum differs" in caplog.text


def test_dataset_when_no_row_has_tokens_then_is_an_error_each_time(tokenizer, config, tmp_path: Path) -> None:
    records = make_records(60)[-5:]
    for _ in range(2):
        with pytest.raises(DataError, match=r"no row has tokens .* 5 × prompt longer than 200 tokens"):
            run(records, tokenizer, config.model_copy(update={"long_prompts": "drop"}), tmp_path)


def test_dataset_when_token_ids_exceed_16_bits_then_keeps_them(config, tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<unk>": 70_000, "</s>": 70_001}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    dataset = run([Record("a", "Q", "", ("w69999",))], large, config, tmp_path)
    assert dataset.row("a") == TokenisedRow("a", [70_000], [69_999, 70_001])


def test_dataset_when_the_folder_is_a_file_then_is_a_resource_error(tokenizer, config, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ResourceError):
        run(make_records(3), tokenizer, config, tmp_path / "cache")


def write_cache(records, tokenizer, config, folder: Path, barrier) -> None:
    barrier.wait(30)
    dataset = tokenise(records, tokenizer, config, folder, "hash")
    assert len(dataset) == len(records)


def test_cache_when_two_processes_write_it_at_once_then_both_finish_with_one_file(tokenizer, config, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    work = (make_records(30), tokenizer, config, tmp_path, barrier)
    writers = [context.Process(target=write_cache, args=work) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_hash_when_the_tokenizer_was_used_then_is_the_same(tokenizer) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2, split_special_tokens=True)
    assert tokenizer_hash(tokenizer) == before


def test_hash_when_saved_and_loaded_then_is_the_same(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == tokenizer_hash(tokenizer)


def test_hash_when_vocabulary_or_eos_differ_then_differs(tokenizer) -> None:
    def word_level(eos: str, *words: str) -> PreTrainedTokenizerFast:
        vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", "<end>", *words])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")

    tokenizers = [
        word_level("</s>", "a"),
        word_level("</s>", "b"),
        word_level("<end>", "a"),
        tokenizer,
        ByT5Tokenizer(),
    ]
    assert len({tokenizer_hash(each) for each in tokenizers}) == 5
