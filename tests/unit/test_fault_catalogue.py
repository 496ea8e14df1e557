"""docs/faults.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CATALOGUE = TESTS.parent / "docs" / "faults.md"


def test_catalogue_when_read_then_every_test_that_it_names_exists() -> None:
    text = CATALOGUE.read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)

    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (TESTS / file).is_file() or f"\ndef {name}(" not in (TESTS / file).read_text(encoding="utf-8")
    ]

    assert not missing
    assert len(named) > 60


def test_catalogue_when_read_then_every_fault_has_a_test() -> None:
    rows = [line for line in CATALOGUE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith("| fault ")]

    assert [row for row in faults if "::test_" not in row] == []
    assert len(faults) > 50
