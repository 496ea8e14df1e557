"""Every format, and every fault that a file of rows can have."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_cli.data.rows import SourceRow, format_of, read_rows
from pocl_cli.errors import DataError, ResourceError

Read = Callable[[str, bytes], list[SourceRow]]

ROWS = [{"instruction": "Say hi", "output": "hi"}, {"instruction": 'Say, "no"\nplease', "output": "no\tno"}]


def as_bytes(name: str) -> bytes:
    """ROWS in the format that `name` ends in."""
    kind = format_of(name)
    if kind == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    elif kind == "json":
        data = json.dumps(ROWS, indent=1).encode()
    elif kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), sink)
        data = sink.getvalue().to_pybytes()
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(ROWS[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        data = text.getvalue().encode()
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(name: str, data: bytes) -> list[SourceRow]:
        (tmp_path / name).write_bytes(data)
        return list(read_rows(tmp_path / name, f"folder/{name}"))

    return read


def values(rows: list[SourceRow]) -> list[dict[str, object]]:
    return [dict(row.values) for row in rows]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_rows_when_a_format_is_read_then_are_those_written(read: Read, kind: str, suffix: str) -> None:
    name = f"rows.{kind}{suffix}"
    assert values(read(name, as_bytes(name))) == ROWS


@pytest.mark.parametrize(
    ("name", "locations"),
    [
        ("rows.jsonl", ["rows.jsonl:1", "rows.jsonl:2"]),
        ("rows.csv", ["rows.csv:2", "rows.csv:3"]),
        ("rows.json", ["rows.json, row 1", "rows.json, row 2"]),
        ("rows.parquet", ["rows.parquet, row 1", "rows.parquet, row 2"]),
    ],
)
def test_location_when_a_row_is_read_then_names_file_and_line(read: Read, name: str, locations: list[str]) -> None:
    rows = read(name, as_bytes(name))
    assert [row.location for row in rows] == locations
    assert [row.where for row in rows] == [f"folder/{location}" for location in locations]


def test_csv_line_when_an_earlier_cell_spans_lines_then_is_where_the_row_starts(read: Read) -> None:
    rows = read("rows.csv", b'instruction,output\n"a\nb",c\nd,e\n')
    assert [row.location for row in rows] == ["rows.csv:2", "rows.csv:4"]


@pytest.mark.parametrize("data", [b"", b"\n", b"\n  \n\t\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_when_a_file_is_empty_or_blank_then_are_none(read: Read, kind: str, data: bytes) -> None:
    if kind == "csv" and data.strip():
        data = b"\xef\xbb\xbf"
    assert [row for row in read(f"rows.{kind}", data) if "instruction" in row.values] == []


def test_json_lines_when_blank_lines_are_between_then_keep_their_numbers(read: Read) -> None:
    rows = read("rows.jsonl", b'\n{"a": "1"}\n\n \r\n{"a": "2"}')
    assert [(row.location, row.values["a"]) for row in rows] == [("rows.jsonl:2", "1"), ("rows.jsonl:5", "2")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_rows_when_a_file_has_bom_and_crlf_then_are_clean(read: Read, kind: str) -> None:
    lines = {
        "jsonl": '{"instruction": "a", "output": "b"}\r\n',
        "json": '[\r\n{"instruction": "a", "output": "b"}]\r\n',
        "csv": "instruction,output\r\na,b\r\n",
        "tsv": "instruction\toutput\r\na\tb\r\n",
    }
    assert values(read(f"rows.{kind}", b"\xef\xbb\xbf" + lines[kind].encode())) == [{"instruction": "a", "output": "b"}]


def test_json_file_when_it_holds_one_object_a_line_then_is_read_as_json_lines(read: Read) -> None:
    rows = read("rows.json", as_bytes("rows.jsonl"))
    assert values(rows) == ROWS
    assert rows[1].location == "rows.json:2"


def test_json_lines_when_a_text_holds_unicode_line_ends_then_stay_one_row(read: Read) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf"
    line = json.dumps({"instruction": text}, ensure_ascii=False).encode()
    assert values(read("rows.jsonl", line + b"\n" + line)) == [{"instruction": text}] * 2


def test_csv_when_a_text_holds_unicode_line_ends_then_stays_one_row(read: Read) -> None:
    assert values(read("rows.csv", "a,b\nx\u2028y,z\x85w\n".encode())) == [{"a": "x\u2028y", "b": "z\x85w"}]


@pytest.mark.parametrize("text", ["مرحبا \u202eabc", "a\0b", "e\u0301👩‍👩‍👧", "\u0001\x1b[31m"])
def test_text_when_right_to_left_nul_or_control_then_survives(read: Read, text: str) -> None:
    assert values(read("rows.jsonl", json.dumps({"output": text}).encode())) == [{"output": text}]


def test_json_lines_when_a_line_is_huge_then_is_read(read: Read) -> None:
    rows = read("rows.jsonl", json.dumps({"output": "word " * 1_000_000}).encode())
    assert len(str(rows[0].values["output"])) == 5_000_000


def test_csv_when_a_cell_is_huge_then_is_read(read: Read) -> None:
    rows = read("rows.csv", b"output\n" + b"a" * 500_000 + b"\n")
    assert len(str(rows[0].values["output"])) == 500_000


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"a": 1', "column"),
        (b'{"a": "1" "b": 2}', "column 11"),
        (b"instruction,output", "column 1"),
        (b'{"a": "tab\there"}', "control character"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
    ],
)
def test_json_lines_when_a_line_is_bad_then_error_names_its_number(read: Read, line: bytes, why: str) -> None:
    with pytest.raises(DataError, match=r"bad JSON in folder/rows\.jsonl:3 — .*" + why):
        read("rows.jsonl", b'{"a": "1"}\n\n' + line + b'\n{"a": "2"}\n')


@pytest.mark.parametrize(
    ("line", "found"), [(b"[1]", "a list"), (b"17", "a number"), (b'"x"', "a text"), (b"null", "null")]
)
def test_json_lines_when_a_line_is_no_object_then_error_says_what_it_is(read: Read, line: bytes, found: str) -> None:
    with pytest.raises(DataError, match=rf"{found} where a row is expected in folder/rows\.jsonl:1"):
        read("rows.jsonl", line)


def test_json_file_when_bad_then_error_names_line_and_column(read: Read) -> None:
    with pytest.raises(DataError, match=r"bad JSON in folder/rows\.json:3 — .* at column 1"):
        read("rows.json", b'[\n{"a": "1"}\n{"a": "2"}]\n')


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_when_a_file_is_not_utf8_then_error_says_so(read: Read, kind: str) -> None:
    with pytest.raises(DataError, match=r"UTF-8 in folder/rows"):
        read(f"rows.{kind}", b'["caf\xe9"]\n')


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_when_a_file_is_utf16_then_error_says_so(read: Read, kind: str) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        read(f"rows.{kind}", '{"a": "b"}\n'.encode("utf-16"))


@pytest.mark.parametrize("line", [b"only one\n", b"a,b,c\n", b'"open\n', b'"a"b,c\n'])
def test_csv_when_a_line_is_bad_then_error_names_its_number(read: Read, line: bytes) -> None:
    with pytest.raises(DataError, match=r"folder/rows\.csv:3"):
        read("rows.csv", b"instruction,output\nx,y\n" + line)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_when_two_columns_share_a_name_then_error_names_it(read: Read, kind: str) -> None:
    data = b"output,output\na,b\n"
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table([["a"], ["b"]], names=["output", "output"]), sink)
        data = sink.getvalue().to_pybytes()
    with pytest.raises(DataError, match="two columns named 'output'"):
        read(f"rows.{kind}", data)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.parquet", "rows.parquet.gz"])
def test_rows_when_a_file_is_truncated_then_error_says_damaged(read: Read, name: str) -> None:
    data = as_bytes(name)
    for size in (1, len(data) // 2, len(data) - 1):
        with pytest.raises(DataError, match=r"damaged (gzip )?file in folder/rows"):
            read(name, data[:size])


def test_rows_when_gzip_bytes_flip_then_error_says_damaged(read: Read) -> None:
    data = bytearray(as_bytes("rows.jsonl.gz"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match="damaged gzip file"):
        read("rows.jsonl.gz", bytes(data))


def test_rows_when_the_file_is_missing_then_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file gone\.jsonl"):
        list(read_rows(tmp_path / "gone.jsonl", "gone.jsonl"))


def test_rows_when_the_file_cannot_be_read_then_error_is_of_a_resource(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(ResourceError, match=r"cannot read rows\.jsonl — Is a directory"):
        list(read_rows(tmp_path / "rows.jsonl", "rows.jsonl"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("A.JSONL.GZ", "jsonl"),
        ("a.b.csv", "csv"),
        ("a.txt", "txt"),
        ("a.doc", None),
        ("a.gz", None),
        ("jsonl", None),
    ],
)
def test_format_when_a_name_is_given_then_is_its_suffix(name: str, kind: str | None) -> None:
    assert format_of(name) == kind
