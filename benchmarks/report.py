"""Puts the results of the benchmarks into a document, as Markdown tables between marks.

    python benchmarks/report.py build/bench.jsonl                       rewrites docs/results.md
    python benchmarks/report.py FILE… --document OTHER.md

Reads the JSON lines that the scripts print (`results.py`, README). A table NAME replaces what stands between
`<!-- bench:NAME -->` and the next `<!-- /bench -->`; one that the document does not have yet goes to its end. All
else stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import entry
from pocl_cli.errors import DataError
from results import heading

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"


@dataclass
class Table:
    """One table: `about` is what `results.print_about` wrote, empty where a script writes none."""

    about: Mapping[str, Any] = field(default_factory=dict)
    rows: list[Mapping[str, Any]] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Rewrites the document. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Results of the benchmarks as tables in a document.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines that the benchmarks printed")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/results.md")
    options = parser.parse_args(arguments)
    tables = read_tables(options.files)
    text = rewritten(options.document.read_text(encoding="utf-8"), tables)
    options.document.write_text(text, encoding="utf-8")
    print(f"{options.document}: {', '.join(tables)}", file=sys.stderr)
    return 0


def read_tables(paths: Iterable[Path]) -> dict[str, Table]:
    """The tables of all files, by name. A second `about` of a table begins it anew: the last measurement counts.

    Raises:
        DataError: a line is no record of a table.
    """
    tables: dict[str, Table] = {}
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            record = _record(line, f"{path}:{number}")
            name = record.pop("table")
            if "about" in record:
                tables[name] = Table(record["about"])
            else:
                tables.setdefault(name, Table()).rows.append(record)
    return tables


def rewritten(document: str, tables: Mapping[str, Table]) -> str:
    """`document` with the section of every table replaced, or added at its end."""
    for name, table in tables.items():
        begin, end = f"<!-- bench:{name} -->", "<!-- /bench -->"
        section = f"{begin}\n{markdown(table)}{end}"
        marked = re.search(re.escape(begin) + ".*?" + re.escape(end), document, re.DOTALL)
        if marked:
            document = document[: marked.start()] + section + document[marked.end() :]
        else:
            document = f"{document.rstrip()}\n\n{section}\n"
    return document


def markdown(table: Table) -> str:
    """The title, the table, and a line about what it was measured on."""
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    lines = [_line(heading(name) for name in columns), _line("---" for _ in columns)]
    lines += [_line(_shown(row.get(name)) for name in columns) for row in table.rows]
    about = table.about
    if about:
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        measured = f"{about['machine']}; threads: {about['threads']}; {versions}; {about['date']}."
        lines = [f"{about['title']}.", "", *lines, "", measured]
    return "".join(f"{line}\n" for line in ("", *lines, ""))


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError("a line that is no JSON", where=where, why=str(error), fix="remove it") from error
    if not isinstance(record, dict) or "table" not in record:
        raise DataError("a line of no table", where=where, why='it has no key "table"', fix="remove it")
    return record


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    entry.run(main)
