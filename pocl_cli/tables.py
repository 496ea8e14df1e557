"""Tables of plain values for people, on stderr. Piped, they fit 80 columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pocl_cli.errors import printable
from pocl_cli.log import duration, get_console
from pocl_cli.redaction import scrub

if TYPE_CHECKING:
    from rich.text import Text

Row = Mapping[str, object]

PIPED_WIDTH = 80
_UNBOUNDED = 10_000
_HEADINGS = {
    "num_rows": "rows",
    "num_tokens": "tokens",
    "num_prompt_tokens": "prompt tokens",
    "num_response_tokens": "response tokens",
    "kd_ratio": "KD ratio",
    "lr": "learning rate",
    "rouge_l": "ROUGE-L",
    "dev_rouge_l": "dev ROUGE-L",
}


def stage_table(rows: Sequence[Row], title: str = "Stages") -> None:
    """Draws the stages in order, one line each, from the rows of `stages.json`."""
    _draw_rows(title, rows)


def partition_table(summary: Sequence[Row], title: str = "Partition, easiest subset first") -> None:
    """Draws the subsets of a partition from the rows of its summary, one line each, then their sample instructions."""
    samples = {row["subset"]: row.get("sample_instructions") for row in summary}
    _draw_rows(title, [{key: value for key, value in row.items() if key != "sample_instructions"} for row in summary])
    for subset, instructions in samples.items():
        for instruction in instructions if isinstance(instructions, list | tuple) else ():
            line = " ".join(str(instruction).split())
            get_console().print(_text(f"  subset {subset}: {line}"), width=_width(), overflow="ellipsis", no_wrap=True)


def sweep_table(rows: Sequence[Row], title: str = "Sweep") -> None:
    """Draws the jobs of a sweep, one line each: its overrides and what came of it."""
    _draw_rows(title, rows)


def results_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Draws any table: `rows` hold as many values as there are `columns`."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table

    assert all(len(row) == len(columns) for row in rows), f"rows of other lengths than the {len(columns)} columns"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        numeric = all(_is_figure(cell) for cell in cells)
        words = [*column.split(), *(_shown(cell) for cell in cells if numeric)]
        # Folding loses nothing, an ellipsis would; a number or a word of a heading stays in one piece where it can.
        width = max((len(word) for word in words), default=1)
        table.add_column(_text(column), justify="right" if numeric else "left", overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(_text(_shown(value)) for value in row))
    console = get_console()
    console.print(_text(title, style="bold"), width=_width())
    # Too wide a table loses no digit: its lines run over.
    needed = Measurement.get(console, console.options.update(max_width=_UNBOUNDED), table).minimum
    console.print(table, width=max(_width(), needed), crop=False, soft_wrap=needed > _width())


def paragraph(text: str = "") -> None:
    """Writes a text between tables, after an empty line; no text is the empty line alone."""
    get_console().print()
    if text:
        get_console().print(_text(text), width=_width())


def summary_panel(title: str, values: Row) -> None:
    """Draws the closing summary of a command: one `name  value` line an entry; keys in `_seconds` are durations."""
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in values.items():
        if name.endswith("_seconds") and isinstance(value, int | float):
            name, value = name.removesuffix("_seconds"), duration(value)
        grid.add_row(_text(_heading(name)), _text(_shown(value)))
    get_console().print(Panel(grid, title=_text(title), title_align="left", expand=False), width=_width())


def _draw_rows(title: str, rows: Sequence[Row]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    results_table(title, [_heading(key) for key in keys], [[row.get(key) for key in keys] for row in rows])


def _heading(key: str) -> str:
    return _HEADINGS.get(key, key.replace("_", " "))


def _is_figure(value: object) -> bool:
    """Whether a cell is a number, one with its spread or interval, or the lack of one."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"[+−<-]?\d[\d.,+−±/\[\] -]*|–", value))
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(entry) for entry in value)
    return str(value)


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(scrub(value)), style=style)


def _width() -> int:
    console = get_console()
    return console.width if console.is_terminal else min(console.width, PIPED_WIDTH)
