"""Which files a path means: files, folders, save_to_disk folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.data.locate import Source, choose_files, locate
from pocl_cli.errors import ConfigError, DataError, SecurityError

LINE = b'{"instruction": "Q", "output": "%s"}\n'


def write(folder: Path, **files: str) -> None:
    """Files of one row each, whose output is the value; a name's "__" is a slash and "_jsonl" its suffix."""
    for name, output in files.items():
        path = folder / (name.replace("__", "/").removesuffix("_jsonl") + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINE % output.encode())


def outputs(source: Source) -> list[str]:
    return [row.values["output"] for row in source.rows()]


def test_file_when_its_preset_names_another_data_file_then_is_the_data(make_config, tmp_path: Path) -> None:
    write(tmp_path, own_jsonl="mine")
    config = make_config(path=str(tmp_path / "own.jsonl"), data_files="raw.jsonl", split="train")
    assert outputs(locate(config, sha256_file)) == ["mine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "no split 'test'"),
        ({"revision": "main"}, "dataset.revision is set for local data"),
        ({"num_rows": 3}, "dataset.num_rows is set for data that are not generated"),
    ],
)
def test_file_when_a_key_has_no_meaning_for_it_then_is_refused(make_config, tmp_path, changes, message) -> None:
    write(tmp_path, own_jsonl="mine")
    with pytest.raises(ConfigError, match=message):
        locate(make_config(path=str(tmp_path / "own.jsonl"), **changes), sha256_file)


def test_path_when_nothing_is_there_then_error_names_the_nearest_file(make_config, tmp_path: Path) -> None:
    write(tmp_path, rows_jsonl="mine")
    with pytest.raises(DataError, match=r"did you mean '.*/rows\.jsonl'"):
        locate(make_config(path=str(tmp_path / "row.jsonl")), sha256_file)


@pytest.mark.parametrize("path", ["", " ", "./gone", "gone/", "a/b/c", "gone.jsonl", "a\0b", "../x", "-x", "a b/c"])
def test_path_when_it_can_be_no_hub_id_then_asks_no_hub(make_config, path: str) -> None:
    with pytest.raises(DataError, match="no file, folder or hub id"):
        locate(make_config(path=path), sha256_file)


def test_file_when_of_no_known_format_then_error_lists_the_formats(make_config, tmp_path: Path) -> None:
    (tmp_path / "rows.doc").write_text("x")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.parquet, \.csv, \.tsv, \.txt, each also \.gz"):
        locate(make_config(path=str(tmp_path / "rows.doc")), sha256_file)


def test_file_when_moved_then_keeps_its_identity_and_when_changed_then_not(make_config, tmp_path: Path) -> None:
    write(tmp_path, a_jsonl="one", sub__b_jsonl="one", c_jsonl="two")
    names = ("a.jsonl", "sub/b.jsonl", "c.jsonl")
    first, moved, changed = (locate(make_config(path=str(tmp_path / name)), sha256_file).identity() for name in names)
    assert first == moved
    assert first != changed
    assert str(tmp_path) not in json.dumps(first)


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["databricks.jsonl", "README.md"], None, ["databricks.jsonl"]),
        (["databricks.jsonl"], "train", ["databricks.jsonl"]),
        (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["dolly_train.csv.gz", "dolly_test.csv.gz"], None, ["dolly_train.csv.gz"]),
        (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], "train_sft",
         ["data/train_sft-00000-of-00001.parquet"]),
        ([f"data/train-0000{i}-of-00003.parquet" for i in range(3)], None,
         [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]),
    ],
)  # fmt: skip
def test_files_when_one_fits_the_split_then_is_chosen(make_config, names, split, chosen) -> None:
    assert choose_files(names, make_config(path="folder", split=split), "folder") == chosen


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["raw.jsonl", "valid.jsonl"], None, "no file of the split 'train' in folder — its data files are raw.jsonl"),
        (["rows.jsonl"], "test", "no file of the split 'test'"),
        (["main/train.jsonl", "socratic/train.jsonl"], None, "several files of the split 'train'"),
        (["train.jsonl", "train.parquet"], None, "several files of the split 'train'"),
        (["train.parquet", "train-00000-of-00001.parquet"], None, "several files of the split 'train'"),
        (["a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"], None, "several files"),
        (["constrained.jsonl", "trains.jsonl"], None, "no file of the split 'train'"),
        (["README.md"], None, "its data files are none"),
    ],
)
def test_files_when_it_is_not_clear_which_then_error_lists_them(make_config, names, split, message) -> None:
    with pytest.raises(DataError, match=message):
        choose_files(names, make_config(path="folder", split=split), "folder")


@pytest.mark.parametrize(("pattern", "expected"), [("b/*.jsonl", ["2", "3"]), ("a.jsonl", ["1"]), ("b/y.jsonl", ["3"])])
def test_folder_when_data_files_are_named_then_reads_these_in_order(make_config, tmp_path, pattern, expected) -> None:
    write(tmp_path, a_jsonl="1", b__y_jsonl="3", b__x_jsonl="2")
    config = make_config(path=str(tmp_path), data_files=pattern)
    assert outputs(locate(config, sha256_file)) == expected


def test_folder_when_data_files_fit_nothing_then_error_lists_what_is_there(make_config, tmp_path: Path) -> None:
    write(tmp_path, a_jsonl="1")
    with pytest.raises(DataError, match=r"no data file 'raw\.jsonl' in .* — its data files are a\.jsonl"):
        locate(make_config(path=str(tmp_path), data_files="raw.jsonl"), sha256_file)


@pytest.mark.parametrize("pattern", ["../rows.jsonl", "/etc/rows.jsonl", "a/../../rows.jsonl"])
def test_folder_when_data_files_lead_outside_then_is_refused(make_config, tmp_path: Path, pattern: str) -> None:
    write(tmp_path, rows_jsonl="secret", folder__a_jsonl="1")
    with pytest.raises(SecurityError, match="leads out of"):
        locate(make_config(path=str(tmp_path / "folder"), data_files=pattern), sha256_file)


ROWS = [{"instruction": f"Q{i}", "output": [f"A{i}", "B"], "number": i} for i in range(5)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set of two shards in `one` and a dictionary of two splits in `two`."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(str(folder / "one"), num_shards=2)
    DatasetDict({"train": rows, "test": rows.select([3, 1])}).save_to_disk(str(folder / "two"))
    return folder


def test_saved_folder_when_read_then_gives_its_rows_in_order(make_config, saved: Path) -> None:
    source = locate(make_config(path=str(saved / "one")), sha256_file)
    rows = list(source.rows())
    assert [dict(row.values) for row in rows] == ROWS
    assert rows[4].location == "one, row 5"


@pytest.mark.parametrize(("split", "numbers"), [(None, [0, 1, 2, 3, 4]), ("train", [0, 1, 2, 3, 4]), ("test", [3, 1])])
def test_saved_dictionary_when_a_split_is_named_then_gives_it(make_config, saved: Path, split, numbers) -> None:
    source = locate(make_config(path=str(saved / "two"), split=split), sha256_file)
    assert [row.values["number"] for row in source.rows()] == numbers


@pytest.mark.parametrize(("folder", "split"), [("two", "tests"), ("one", "test")])
def test_saved_folder_when_the_split_is_unknown_then_is_refused(make_config, saved: Path, folder, split) -> None:
    with pytest.raises(ConfigError, match=rf"no split '{split}'"):
        locate(make_config(path=str(saved / folder), split=split), sha256_file)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "sub/x.arrow", "", "..", "a\0b", None])
def test_saved_folder_when_its_index_points_outside_then_is_refused(make_config, tmp_path: Path, name) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(SecurityError, match="no plain name"):
        locate(make_config(path=str(tmp_path)), sha256_file)


def test_saved_dictionary_when_a_split_points_outside_then_is_refused(make_config, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "../other"]}')
    with pytest.raises(SecurityError, match="no plain name"):
        locate(make_config(path=str(tmp_path)), sha256_file)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"_data_files": 3}'])
def test_saved_folder_when_its_index_is_damaged_then_is_an_error(make_config, tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(DataError, match="damaged index"):
        locate(make_config(path=str(tmp_path)), sha256_file)


def test_saved_folder_when_a_shard_is_truncated_then_is_an_error(make_config, tmp_path: Path, saved: Path) -> None:
    shard = next((saved / "one").glob("*-00000-of-00002.arrow"))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    (tmp_path / "x.arrow").write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged file"):
        list(locate(make_config(path=str(tmp_path)), sha256_file).rows())
