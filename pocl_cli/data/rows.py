"""Rows as files hold them: JSON lines, JSON, CSV, TSV, Parquet, Arrow and plain text, read one after the other."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pocl_cli.errors import DataError, ResourceError, SecurityError

FORMATS = ("jsonl", "json", "parquet", "csv", "tsv", "txt")
# The column of the rows of a .txt file.
TEXT = "text"
_MEND_JSON = "mend or remove the line (a .jsonl file holds one row a line, a .json file that or one list of rows)"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


# Text packs to a twentieth of its size, the same letter again and again to a thousandth.
_LARGEST_UNPACKED, _LARGEST_RATIO = 2**26, 200


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row. `location` ("rows.jsonl:17") does not depend on the file's folder; `where` is the same place in full."""

    location: str
    where: str
    values: Mapping[str, Any]


def format_of(name: str) -> str | None:
    """The format that a file's name says ("rows.jsonl.gz" → "jsonl"), or None for an unknown one."""
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    return suffix if suffix in FORMATS else None


def unknown_format(shown: str) -> DataError:
    """The error for a file whose name says no format that is read."""
    known = ", ".join(f".{name}" for name in FORMATS)
    return DataError(f"{shown} is of no known format", why=f"known are {known}, each also .gz", fix="convert the file")


def read_rows(path: Path, shown: str) -> Iterator[SourceRow]:
    """The rows of a file whose name ends in one of FORMATS, with or without ".gz".

    Args:
        path: the file.
        shown: its name for people, which locations and errors use.

    Raises:
        DataError: the file is missing, damaged, of no known format, or holds something that is no row; names the line.
        ResourceError: the file cannot be read.
        SecurityError: a packed file unpacks to far more than text would.
    """
    readers = {"jsonl": _json_lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet, "txt": _txt}
    kind = format_of(path.name)
    if kind is None:
        raise unknown_format(shown)
    with _readable(shown):
        yield from readers[kind](path, shown)


def read_arrow_streams(paths: Iterable[Path], shown: str) -> Iterator[SourceRow]:
    """The rows of Arrow stream files (the shards of a `save_to_disk` folder), numbered through.

    Raises as `read_rows`.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        for path in paths:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                yield from stream

    with _readable(shown), _arrow_readable(shown):
        yield from _arrow_rows(batches(), shown)


def numbered(values: Iterable[Mapping[str, Any]], shown: str) -> Iterator[SourceRow]:
    """Rows that have a number but no line: "rows.parquet, row 17"."""
    for number, row in enumerate(values, 1):
        yield _row(shown, f", row {number}", row)


def _row(shown: str, place: str, values: Mapping[str, Any]) -> SourceRow:
    return SourceRow(f"{PurePosixPath(shown).name}{place}", f"{shown}{place}", values)


@contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no file {shown}", fix="check dataset.path") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError("damaged gzip file", where=shown, why=str(error), fix="make or fetch it again") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(shown, error) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise ResourceError(f"cannot read {shown}", why=why, fix="check its permissions and the disk") from error


@contextmanager
def _arrow_readable(shown: str) -> Iterator[None]:
    # Apart from _readable, so that text files are read without importing pyarrow.
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise DataError("damaged file", where=shown, why=str(error), fix="make or fetch it again") from error


def _open(path: Path) -> BinaryIO:
    return io.BufferedReader(_Unpacking(path)) if path.name.lower().endswith(".gz") else open(path, "rb")


class _Unpacking(io.RawIOBase):
    """The content of a packed file, up to what text can come to: a small file may unpack to more than the memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._packed = path, gzip.GzipFile(path, "rb")
        self._limit = max(_LARGEST_UNPACKED, _LARGEST_RATIO * path.stat().st_size)
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._packed.readinto(buffer)
        self._num_bytes += count
        if self._num_bytes > self._limit:
            raise SecurityError(
                "a packed file that is no text",
                where=str(self._path),
                why=f"it unpacks to more than {_LARGEST_RATIO} times its size",
                fix="look what is in it, and unpack it yourself if you trust it",
            )
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


def _json_lines(path: Path, shown: str) -> Iterator[SourceRow]:
    with _open(path) as lines:
        # A binary file is split at \n only: U+2028 and the like are ordinary characters of a text.
        for number, line in enumerate(lines, 1):
            text = _without_bom(line, shown) if number == 1 else line
            if text.strip():
                where = f"{shown}:{number}"
                yield _row(shown, f":{number}", _as_object(_parsed(text, where), where))


def _json(path: Path, shown: str) -> Iterator[SourceRow]:
    with _open(path) as handle:
        head = handle.readline()
        while head and not head.strip(_UTF8_BOM + b" \t\r\n"):
            head = handle.readline()
    if not head.lstrip(_UTF8_BOM + b" \t\r\n").startswith(b"["):
        # Many files named .json hold one object a line.
        yield from _json_lines(path, shown)
        return
    with _open(path) as handle:
        rows = _parsed(_without_bom(handle.read(), shown), shown)
    for number, values in enumerate(rows, 1):
        place = f", row {number}"
        yield _row(shown, place, _as_object(values, f"{shown}{place}"))


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if b"\n" in raw.rstrip() else where
        raise DataError("bad JSON", where=place, why=f"{error.msg} at column {error.colno}", fix=_MEND_JSON) from error
    except (RecursionError, ValueError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DataError("bad JSON", where=where, why=why, fix=_MEND_JSON) from error


def _as_object(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{json_type(value)} where a row is expected",
        where=where,
        why="a row is a JSON object with a key a column",
        fix='write it as {"instruction": …, "output": …}',
    )


def json_type(value: Any) -> str:
    """What a value is, in the words of JSON: "a number", "a list"."""
    if isinstance(value, str):
        return "a text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _without_bom(head: bytes, shown: str) -> bytes:
    if head.startswith(_UTF16_BOMS):
        raise DataError("a file that is not UTF-8", where=shown, why="it begins like UTF-16", fix="save it as UTF-8")
    return head.removeprefix(_UTF8_BOM)


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    why = f"{error.reason} (byte {error.object[error.start]:#04x})"
    return DataError("text that is not UTF-8", where=where, why=why, fix="save the file as UTF-8")


def _csv(path: Path, shown: str) -> Iterator[SourceRow]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 131,072 characters
    delimiter = "\t" if format_of(path.name) == "tsv" else ","
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                where = f"{shown}:{start}"
                raise DataError("bad CSV", where=where, why=str(error), fix="mend or remove the line") from error
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = _unique(cells, shown)
                continue
            if len(cells) != len(header):
                raise DataError(
                    "a row of another length",
                    where=f"{shown}:{start}",
                    why=f"{len(cells)} cells where the header has {len(header)}",
                    fix="mend or remove the line (a cell with a comma or a line break needs quotes)",
                )
            yield _row(shown, f":{start}", dict(zip(header, cells, strict=True)))


def _unique(columns: list[str], shown: str) -> list[str]:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise DataError(f"two columns named {twice[0]!r}", where=shown, fix="rename one of them")
    return columns


def _txt(path: Path, shown: str) -> Iterator[SourceRow]:
    """Documents, which blank lines separate; a document's place is its first line."""
    lines: list[str] = []
    start = 0
    with _open(path) as raw:
        for number, line in enumerate(raw, 1):
            where = f"{shown}:{number}"
            try:
                text = (_without_bom(line, shown) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from error
            if text.strip():
                start = start or number
                lines.append(text)
            elif lines:
                yield _document(shown, start, lines)
                lines, start = [], 0
    if lines:
        yield _document(shown, start, lines)


def _document(shown: str, start: int, lines: list[str]) -> SourceRow:
    return _row(shown, f":{start}", {TEXT: "".join(lines).rstrip("\r\n")})


def _parquet(path: Path, shown: str) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _arrow_readable(shown), _open(path) as handle:
        source = pa.BufferReader(handle.read()) if path.name.lower().endswith(".gz") else handle
        yield from _arrow_rows(pq.ParquetFile(source).iter_batches(batch_size=1024), shown)


def _arrow_rows(batches: Iterator[Any], shown: str) -> Iterator[SourceRow]:
    def values() -> Iterator[Mapping[str, Any]]:
        for batch in batches:
            _unique(list(batch.schema.names), shown)
            yield from batch.to_pylist()

    yield from numbered(values(), shown)
