"""Counts of the reasons why rows are not used."""

from __future__ import annotations

from pocl_cli.data.dropped import count_reasons, reasons_text
from pocl_cli.records import DroppedRow


def rows(*reasons: str) -> list[DroppedRow]:
    return [DroppedRow(f"rows.jsonl:{number}", reason) for number, reason in enumerate(reasons, 1)]


def test_reasons_when_counted_then_the_most_frequent_comes_first_and_ties_by_name() -> None:
    assert list(count_reasons(rows("c", "b", "a", "b")).items()) == [("b", 2), ("a", 1), ("c", 1)]


def test_reasons_when_written_then_are_one_line() -> None:
    assert reasons_text(rows("b", "a", "b")) == "2 × b, 1 × a"
    assert reasons_text([]) == ""
