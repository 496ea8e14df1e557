"""Loading a data set into records, and its identity."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pocl_cli.artifacts.hashing import HashCache
from pocl_cli.data.sources import dataset_identity, load_dataset, record_id
from pocl_cli.data.template import render_prompt
from pocl_cli.errors import ConfigError, DataError
from pocl_cli.records import DroppedRow


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"Q{number}", "output": f"A{number}", **more}


def test_record_when_loaded_then_has_texts_references_and_category(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"question": "Q", "context": "I", "output": ["A", "B"], "topic": "C"})
    (record,) = load_dataset(make_config(path=path)).records
    assert (record.instruction, record.input, record.references, record.category) == ("Q", "I", ("A", "B"), "C")
    assert record.response == "A"
    assert record.id == hashlib.sha256(b'["Q","I",["A","B"]]').hexdigest()[:16]


def test_ids_when_rows_are_identical_then_copies_are_kept_and_numbered(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1), row(2), row(1), row(1, category="other"))
    first = record_id("Q1", "", ("A1",))
    ids = [record.id for record in load_dataset(make_config(path=path)).records]
    assert ids == [first, record_id("Q2", "", ("A2",)), f"{first}-2", f"{first}-3"]


def test_ids_when_a_text_moves_to_another_column_then_differ() -> None:
    assert len({record_id("a", "b", ("c",)), record_id("ab", "", ("c",)), record_id("a", "b", ("c", "d"))}) == 3


def test_rows_when_unusable_then_are_dropped_with_reason_and_place(make_config, tmp_path: Path, caplog) -> None:
    rows = (row(1), row(2, output=""), {"instruction": "", "output": "A"}, row(3, input="\ud800"), row(4, output=" "))
    path = write(tmp_path / "rows.jsonl", *rows)
    with caplog.at_level(logging.INFO, "pocl"):
        loaded = load_dataset(make_config(path=path))
    assert [record.instruction for record in loaded.records] == ["Q1"]
    assert loaded.dropped == (
        DroppedRow("rows.jsonl:2", "empty response"),
        DroppedRow("rows.jsonl:3", "empty prompt"),
        DroppedRow("rows.jsonl:4", "text with a lone surrogate"),
        DroppedRow("rows.jsonl:5", "empty response"),
    )
    assert "1 rows are used, 4 are dropped: 2 × empty response, 1 × empty prompt" in caplog.text


def test_limit_when_rows_are_dropped_then_counts_usable_rows_and_reads_no_further(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1, output=""), row(2), row(3), row(4, output=""))
    with open(path, "a") as handle:
        handle.write("not JSON\n")
    loaded = load_dataset(make_config(path=path, limit=2))
    assert [record.instruction for record in loaded.records] == ["Q2", "Q3"]
    assert [row.location for row in loaded.dropped] == ["rows.jsonl:1"]


def test_limit_when_above_the_number_of_rows_then_takes_all(make_config, tmp_path: Path) -> None:
    assert len(load_dataset(make_config(path=write(tmp_path / "rows.jsonl", row(1)), limit=10)).records) == 1


@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff"])
def test_data_when_empty_or_blank_then_are_an_error(make_config, tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"no usable row in .*rows\.jsonl — 0 rows were read"):
        load_dataset(make_config(path=str(tmp_path / "rows.jsonl")))


def test_data_when_no_row_is_usable_then_error_counts_the_reasons(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1, output=""), row(2, output=None), {"instruction": "", "output": "A"})
    with pytest.raises(
        DataError, match=r"3 rows were read; dropped were 2 × empty response, 1 × empty prompt"
    ) as caught:
        load_dataset(make_config(path=path))
    assert caught.value.exit_code == 3


def test_data_when_a_type_changes_after_many_rows_then_error_names_the_line(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *(row(i) for i in range(10_000)), row(1, output=7), row(2))
    with pytest.raises(DataError, match=r"column 'output' holds a number in .*rows\.jsonl:10001"):
        load_dataset(make_config(path=path))


def test_data_when_the_output_turns_from_text_to_list_then_both_are_read(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *(row(i) for i in range(10_000)), row(1, output=["A", "B"]))
    assert load_dataset(make_config(path=path)).records[-1].references == ("A", "B")


def test_data_when_a_column_is_missing_then_error_shows_the_override_that_mends_it(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"ask": "Q", "output": "A"})
    with pytest.raises(DataError, match=r"dataset\.fields\.instruction=ask"):
        load_dataset(make_config(path=path))
    loaded = load_dataset(make_config(path=path, fields={"instruction": "ask"}))
    assert loaded.records[0].instruction == "Q"


def test_data_when_a_named_optional_column_is_in_no_row_then_is_an_error(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1, context="I"))
    with pytest.raises(DataError, match="no column 'contexts'"):
        load_dataset(make_config(path=path, fields={"input": "contexts"}))


def test_identity_when_asked_before_loading_then_is_the_loaded_one(make_config, tmp_path: Path) -> None:
    config = make_config(path=write(tmp_path / "rows.jsonl", row(1)), limit=1)
    assert dataset_identity(config) == load_dataset(config).identity
    assert dataset_identity(config, HashCache(tmp_path / "outputs").sha256_file) == dataset_identity(config)


@pytest.mark.parametrize(
    ("change", "matters"),
    [
        ({"limit": 1}, True),
        ({"fields": {"output": "output"}}, True),
        ({"max_tokens": 300}, True),
        ({"max_prompt_tokens": 100}, True),
        ({"long_prompts": "drop"}, True),
        ({"dev_size": 1}, True),
        ({"seed": 11}, False),
        ({"name": "other"}, False),
    ],
)
def test_identity_when_a_key_changes_then_follows_what_decides_the_content(
    make_config, tmp_path, change, matters
) -> None:
    path = write(tmp_path / "rows.jsonl", row(1), row(2))
    assert (dataset_identity(make_config(path=path)) != dataset_identity(make_config(path=path, **change))) == matters


def test_identity_when_dev_rows_are_held_out_then_holds_their_seed(make_config, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(1), row(2))
    first, second = (dataset_identity(make_config(path=path, dev_size=1, seed=seed)) for seed in (10, 11))
    assert first != second


def test_generator_when_named_then_makes_the_same_rows_each_time(make_config) -> None:
    config = make_config(generator="toy", num_rows=40)
    loaded = load_dataset(config)
    assert len(loaded.records) == 40
    assert loaded == load_dataset(config)
    assert loaded.records[:20] == load_dataset(make_config(generator="toy", num_rows=40, limit=20)).records


def test_generator_when_seed_or_split_changes_then_makes_other_rows_under_another_identity(make_config) -> None:
    configs = [make_config(generator="toy", num_rows=40, **change) for change in ({}, {"seed": 11}, {"split": "test"})]
    loaded = [load_dataset(config) for config in configs]
    assert len({data.records for data in loaded}) == 3
    assert len({json.dumps(data.identity) for data in loaded}) == 3
    assert [data.identity["source"]["split"] for data in loaded] == ["train", "train", "test"]


@pytest.mark.parametrize("change", [{"data_files": "x.jsonl"}, {"revision": "main"}, {"split": "tset"}])
def test_generator_when_a_key_has_no_meaning_for_it_then_is_refused(make_config, change: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        load_dataset(make_config(generator="toy", num_rows=4, **change))


def test_generator_when_unknown_then_error_names_the_nearest(make_config) -> None:
    with pytest.raises(ConfigError, match="did you mean 'toy'"):
        load_dataset(make_config(generator="toi", num_rows=4))


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "num_rows"), [("dolly_eval", 500), ("self_inst", 242), ("vicuna_eval", 80), ("s_ni", 1694)]
)
def test_real_sets_when_loaded_then_keep_every_row_and_its_published_prompt(
    make_config, shared_data: Path, name: str, num_rows: int
) -> None:
    path = shared_data / f"{name}.jsonl"
    loaded = load_dataset(make_config(path=str(path)))
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert (len(loaded.records), loaded.dropped) == (num_rows, ())
    outputs = [line["output"] if isinstance(line["output"], list) else [line["output"]] for line in lines]
    assert [list(record.references) for record in loaded.records] == outputs
    assert [render_prompt(r.instruction, r.input) for r in loaded.records] == [line["prompt"] for line in lines]
