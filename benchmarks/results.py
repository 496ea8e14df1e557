"""Results as JSON lines on standard output, one table row a line: what the benchmarks print and `report.py` reads."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

PACKAGES = ("torch", "transformers")
# Columns whose heading is not their name with spaces.
HEADINGS = {"seconds": "s wall", "cpu_seconds": "s CPU", "peak_gb": "peak GB", "gb_ratio": "GB ratio"}


def heading(column: str) -> str:
    """What stands over a column."""
    return HEADINGS.get(column, column.replace("_", " "))


def print_row(table: str, **columns: object) -> None:
    """One row of `table`: column → number, text or None, in the order in which they are shown."""
    print(json.dumps({"table": table, **columns}), flush=True)


def print_about(table: str, title: str, *, num_threads: int | None = None, packages: Sequence[str] = ()) -> None:
    """What stands above `table`: its title, and what it was measured on.

    Args:
        table: its name.
        title: one sentence that says what the rows are.
        num_threads: torch's threads; None where a script does not know them: then what OMP_NUM_THREADS says.
        packages: installed packages whose versions matter beside torch and transformers.
    """
    threads = num_threads if num_threads is not None else os.environ.get("OMP_NUM_THREADS", "torch's choice")
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)}
    about = {
        "title": title,
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}",
        "threads": threads,
        "versions": versions,
        "date": date.today().isoformat(),
    }
    print(json.dumps({"table": table, "about": about}), flush=True)


def _processor() -> str:
    """The processor's name: Linux has it in a file, elsewhere Python's answer does."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
