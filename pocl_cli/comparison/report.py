"""A comparison for people: the same tables for the terminal and as Markdown, and one flat table as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pocl_cli.comparison.outcome import ANSWER_METRICS
from pocl_cli.comparison.statistics import least_p_over_seeds

if TYPE_CHECKING:
    from pocl_cli.comparison.results import Difference, Figure, Row
    from pocl_cli.schema import ComparisonConfig

# More groups than these are left to table.csv and comparison.json.
_SHOWN_GROUPS = 4
_NONE = "–"


class Table(NamedTuple):
    """One table: a cell is a text or a number for each of the columns."""

    title: str
    columns: tuple[str, ...]
    cells: list[list[object]]


def tables_of(
    rows: Sequence[Row],
    mismatches: Mapping[str, Mapping[str, Sequence[str]]],
    comparison: ComparisonConfig,
    num_prompts: Mapping[str, int],
) -> list[Table]:
    """Two tables a data set and method, then what the arms spend."""
    found = []
    for dataset, method in dict.fromkeys((row["dataset"], row["method"]) for row in rows):
        shown = [row for row in rows if (row["dataset"], row["method"]) == (dataset, method)]
        found += [_differences(shown, comparison, num_prompts[dataset]), _beside(shown)]
    of_first = [row for row in rows if row["dataset"] == rows[0]["dataset"]]
    spent = [
        _spent([row for row in of_first if row["method"] == method], mismatches[method], comparison)
        for method in dict.fromkeys(row["method"] for row in of_first)
    ]
    return [*found, *spent]


def notes(comparison: ComparisonConfig, num_tests: int) -> list[str]:
    """How the tables are to be read."""
    num_seeds, baseline, percent = len(comparison.seeds), comparison.baseline, f"{100 * comparison.confidence:g} %"
    if num_seeds > 1:
        spread = (
            f"± is the standard deviation over {num_seeds} training seeds. A difference is to {baseline} on the same "
            f"prompt with the same seed; its {percent} interval is for other training seeds and other prompts."
        )
    else:
        spread = (
            f"One training seed. A difference is to {baseline} on the same prompt; its {percent} interval is for other "
            "prompts, and says nothing of other training seeds."
        )
    tests = (
        "p prompts: signs flipped prompt by prompt, about these trained students. p seeds: flipped training seed by "
        f"training seed, before adjustment at least {least_p_over_seeds(num_seeds):.3g} with {num_seeds}. Both after "
        f"Holm over {num_tests} rows. W/T/L: in how many of 100 answers the arm scores higher, the same, lower."
    )
    return [spread, tests]


def markdown(name: str, tables: Sequence[Table], remarks: Sequence[str]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {name}"]
    for table in tables:
        lines = [f"## {table.title}", "", _pipes(table.columns), _pipes(["---"] * len(table.columns))]
        parts.append("\n".join([*lines, *(_pipes([_plain(cell) for cell in cells]) for cells in table.cells)]))
    return "\n\n".join([*parts, "\n".join(f"* {remark}" for remark in remarks)]) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """One line a data set, method and arm, with every number that comparison.json has of it, those by seed left out."""
    lines = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    target = io.StringIO()
    writer = csv.DictWriter(target, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return target.getvalue()


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _differences(rows: Sequence[Row], comparison: ComparisonConfig, num_prompts: int) -> Table:
    first, percent = rows[0], f"{100 * comparison.confidence:g} %"
    seeds = "1 training seed" if len(comparison.seeds) == 1 else f"{len(comparison.seeds)} training seeds"
    return Table(
        f"{first['dataset']}, {first['method']}: against {comparison.baseline}, {seeds}, {num_prompts:,} prompts",
        (
            "arm",
            "ROUGE-L",
            f"difference [{percent}]",
            "p prompts",
            "p seeds",
            "W/T/L %",
        ),
        [[row["arm"], _spread(row["figures"]["rouge_l"]), *_tested(row["differences"].get("rouge_l"))] for row in rows],
    )


def _tested(difference: Difference | None) -> list[object]:
    if difference is None:
        return [_NONE] * 4
    low, high = difference["low"], difference["high"]
    interval = "" if low is None or high is None else f" [{_signed(low)}, {_signed(high)}]"
    counts = (difference["wins"], difference["ties"], difference["losses"])
    return [
        f"{_signed(difference['mean'])}{interval}",
        _p(difference["p_prompts_holm"]),
        _p(difference["p_seeds_holm"]),
        "/".join(f"{100 * count / sum(counts):.0f}" for count in counts),
    ]


def _beside(rows: Sequence[Row]) -> Table:
    """What stands beside ROUGE-L: exact match, cross entropy, the levels of difficulty."""
    first = rows[0]
    others = {"cross_entropy": "cross entropy", "dev_cross_entropy": "dev cross entropy"}
    others = {name: heading for name, heading in others.items() if all(name in row["figures"] for row in rows)}
    groups = _ordered_groups(rows) if len(first["groups"]) <= _SHOWN_GROUPS else []
    return Table(
        f"{first['dataset']}, {first['method']}: beside it{', ROUGE-L by level' if groups else ''}",
        ("arm", "exact match", *others.values(), *groups),
        [
            [
                row["arm"],
                _spread(row["figures"]["exact_match"]),
                *(f"{row['figures'][name]['mean']:.4f}" for name in others),
                *(f"{row['groups'][name]['mean']:.2f}" for name in groups),
            ]
            for row in rows
        ],
    )


def _ordered_groups(rows: Sequence[Row]) -> list[str]:
    """The groups of rows, first those that the arms answer best."""
    return sorted(rows[0]["groups"], key=lambda name: -sum(row["groups"][name]["mean"] for row in rows))


def _spent(rows: Sequence[Row], mismatches: Mapping[str, Sequence[str]], comparison: ComparisonConfig) -> Table:
    return Table(
        f"{rows[0]['method']}: what the arms spend",
        ("arm", "steps", "response tokens", "train seconds", f"differs from {comparison.baseline} in"),
        [
            [
                row["arm"],
                row["steps"],
                row["response_tokens"],
                round(row["train_seconds"], 1),
                "; ".join(mismatches[row["arm"]]) or "nothing",
            ]
            for row in rows
        ],
    )


# ── cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _spread(figure: Figure) -> str:
    return f"{figure['mean']:.2f}" + ("" if figure["std"] is None else f" ± {figure['std']:.2f}")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _plain(cell: object) -> str:
    return _NONE if cell is None else f"{cell:,}" if isinstance(cell, int | float) else str(cell)


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _flat(row: Row) -> dict[str, object]:
    figures = {**row["figures"], **{f"rouge_l_{name}": figure for name, figure in row["groups"].items()}}
    numbers: dict[str, object] = {
        f"{name}_{part}": value
        for name, figure in figures.items()
        for part, value in (("mean", figure["mean"]), ("std", figure["std"]))
    }
    for metric in ANSWER_METRICS:
        difference = row["differences"].get(metric)
        numbers |= {f"{metric}_difference_{part}": value for part, value in (difference or {}).items()}
    spent = {name: row[name] for name in ("steps", "response_tokens", "train_seconds")}
    return {"dataset": row["dataset"], "method": row["method"], "arm": row["arm"], **numbers, **spent}
