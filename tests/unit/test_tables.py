from __future__ import annotations

import pytest

from pocl_cli.tables import partition_table, results_table, stage_table, summary_panel, sweep_table

STAGE = {
    "stage": 3,
    "num_rows": 11435,
    "epochs": 20,
    "steps": 14299,
    "temperature": 4 / 3,
    "kd_ratio": 0.25,
    "lr": 5e-4,
}


def test_stage_table_when_piped_then_all_values_stand_in_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    stage_table([STAGE, STAGE])
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["3", "11,435", "20", "14,299", "1.333", "0.25", "0.0005"]
    assert lines[0].strip() == "Stages"


def test_partition_table_when_a_row_lacks_a_value_then_a_dash_stands_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    partition_table([{"subset": 0, "num_rows": 5, "rouge_l": 0.5}, {"subset": 1, "num_rows": 4}])
    assert capsys.readouterr().err.splitlines()[-1].split() == ["1", "4", "–"]


def test_partition_table_when_subsets_have_samples_then_each_is_one_line_below_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    partition_table([{"subset": 0, "num_rows": 5, "sample_instructions": ["two\nlines", "long " * 40]}])
    lines = capsys.readouterr().err.splitlines()
    assert "sample" not in lines[1]
    assert lines[-2].strip() == "subset 0: two lines"
    assert len(lines[-1]) <= 80
    assert lines[-1].rstrip().endswith("…")


def test_sweep_table_when_a_path_is_long_then_it_is_folded_and_nothing_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = "outputs/students/" + "".join(f"-{number}" for number in range(60))
    sweep_table([{"job": 0, "overrides": "train.seed=10", "result": path, "exit": 0}])
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    folded = [part for line in lines[3:] for part in line.split() if part not in {"0", "train.seed=10"}]
    assert "".join(folded) == path


def test_results_table_when_text_holds_markup_escapes_and_secrets_then_it_is_shown_as_plain_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results_table("[red]title[/red]", ["name"], [["[bold]x[/bold]\x1b[31m"], ["token=abc"]])
    text = capsys.readouterr().err
    assert "[red]title[/red]" in text
    assert "[bold]x[/bold]\\x1b[31m" in text
    assert "token=***" in text


def test_results_table_when_there_are_more_columns_than_fit_then_every_value_is_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = [7.665e-08 + number for number in range(14)]
    results_table("wide", [f"metric {number}" for number in range(14)], [values])
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].split() == [f"{value:.4g}" for value in values]


def test_results_table_when_a_row_is_too_short_then_the_caller_is_stopped() -> None:
    with pytest.raises(AssertionError, match="other lengths than the 2 columns"):
        results_table("t", ["a", "b"], [[1]])


def test_summary_panel_when_values_are_seconds_or_flags_then_people_can_read_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary_panel("distill", {"artifact": "outputs/students/a", "train_seconds": 3723.2, "reused": False})
    text = capsys.readouterr().err
    assert "1 h 02 min" in text
    assert "reused" in text
    assert " no " in text
    assert "outputs/students/a" in text
