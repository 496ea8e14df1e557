"""The rows of a comparison: means over seeds, paired differences, levels, the adjustment over the table."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from pocl_cli.comparison import report, results, statistics
from pocl_cli.comparison.arms import Cell
from pocl_cli.comparison.outcome import Answers, Outcome, check_same_prompts
from pocl_cli.errors import DataError

from ...support.comparison import make_comparison, make_outcome

COMPARISON = make_comparison()
FLAT = {1: [10.0, 20.0, 30.0, 100.0], 2: [20.0, 20.0, 40.0, 50.0]}
POCL = {1: [15.0, 20.0, 20.0, 100.0], 2: [30.0, 25.0, 40.0, 100.0]}


def outcomes() -> dict[Cell, Outcome]:
    made = [
        make_outcome(Cell("fkl", arm, seed), values, steps=steps)
        for arm, of_arm, steps in (("flat", FLAT, (10,)), ("pocl", POCL, (4, 6)))
        for seed, values in of_arm.items()
    ]
    return {one.cell: one for one in made}


def test_compare_when_two_arms_answered_then_means_and_spread_are_over_the_training_seeds() -> None:
    flat, pocl = results.compare(outcomes(), COMPARISON)
    assert (flat["arm"], pocl["arm"], pocl["method"], pocl["dataset"]) == ("flat", "pocl", "fkl", "toy")
    assert flat["figures"]["rouge_l"] == {
        "mean": 36.25,
        "std": pytest.approx(7.5 / 2**0.5),  # of 40 and 32.5
        "per_seed": {"1": 40.0, "2": 32.5},
    }
    assert flat["figures"]["exact_match"]["per_seed"] == {"1": 25.0, "2": 0.0}
    assert flat["figures"]["cross_entropy"]["mean"] == 3.5
    assert flat["figures"]["dev_rouge_l"]["mean"] == 51.5
    assert (pocl["steps"], pocl["response_tokens"], pocl["train_seconds"]) == (10, 150, 1.5)


def test_compare_when_answers_are_paired_then_differences_are_per_prompt_and_seed() -> None:
    flat, pocl = results.compare(outcomes(), COMPARISON)
    expected = np.array([[5.0, 0.0, -10.0, 0.0], [10.0, 5.0, 0.0, 50.0]])
    found = pocl["differences"]["rouge_l"]
    drawn = {"num_resamples": 200, "seed": 0}
    assert flat["differences"] == {}
    assert found["mean"] == 7.5
    assert (found["wins"], found["ties"], found["losses"]) == (4, 3, 1)
    interval = statistics.bootstrap_interval(expected, confidence=0.95, **drawn)
    assert (found["low"], found["high"]) == interval
    assert found["p_prompts"] == statistics.p_over_prompts(expected, **drawn)
    assert found["p_seeds"] == statistics.p_over_seeds(expected, **drawn)
    assert pocl["differences"]["exact_match"]["mean"] == 12.5


def test_compare_when_rows_have_levels_then_each_has_its_mean() -> None:
    flat, pocl = results.compare(outcomes(), COMPARISON)
    assert flat["groups"]["hard"]["mean"] == 55.0
    assert pocl["groups"]["easy"]["per_seed"] == {"1": 17.5, "2": 27.5}


def test_levels_when_categories_have_none_then_the_categories_are_the_groups() -> None:
    assert results._levels({"qa": {"mean": 3.0, "num_rows": 2}}) == {"qa": 3.0}
    leveled = {"a/x": {"mean": 1.0, "num_rows": 1}, "b/x": {"mean": 4.0, "num_rows": 2}}
    assert results._levels(leveled) == {"x": 3.0}
    assert results._levels({}) == {}


def test_compare_when_there_are_several_rows_then_holm_is_over_all_of_them() -> None:
    comparison = make_comparison(arms={"flat": (), "pocl": (), "random": ()}, methods=("fkl", "rkl"))
    made = {}
    generator = np.random.default_rng(0)
    for method in ("fkl", "rkl"):
        for arm, shift in (("flat", 0.0), ("pocl", 3.0), ("random", 8.0)):
            for seed in (1, 2):
                values = 40 + shift + generator.standard_normal(12)
                made[Cell(method, arm, seed)] = make_outcome(Cell(method, arm, seed), list(values))
    rows = results.compare(made, comparison)
    assert [(row["method"], row["arm"]) for row in rows] == [
        (method, arm) for method in ("fkl", "rkl") for arm in ("flat", "pocl", "random")
    ]
    tested = [row["differences"]["rouge_l"] for row in rows if row["differences"]]
    assert len(tested) == 4
    assert [one["p_prompts_holm"] for one in tested] == statistics.holm([one["p_prompts"] for one in tested])
    assert [one["p_seeds_holm"] for one in tested] == [1.0] * 4  # two seeds: 0.5 at least


def test_compare_when_a_run_has_no_dev_figures_then_they_are_absent() -> None:
    made = outcomes()
    cell = Cell("fkl", "pocl", 2)
    made[cell] = make_outcome(cell, POCL[2], dev=False)
    flat, pocl = results.compare(made, COMPARISON)
    assert "dev_rouge_l" in flat["figures"]
    assert "dev_rouge_l" not in pocl["figures"]


def test_matching_when_the_learning_rate_falls_otherwise_then_it_is_said() -> None:
    assert results.matching(outcomes(), COMPARISON) == {
        "fkl": {
            "flat": [],
            "pocl": ["2 cosines of the learning rate instead of one cosine", "2 fresh optimizers instead of 1"],
        }
    }


def test_prompts_when_runs_answered_other_rows_then_they_are_refused() -> None:
    made = list(outcomes().values())
    check_same_prompts(made)
    short = replace(made[1], answers={"toy": Answers(("r0",), {})})
    with pytest.raises(DataError, match="flat, seed 2 answered other rows of toy"):
        check_same_prompts([made[0], short])


# ── what a person reads ───────────────────────────────────────────────────────────────────────────────────────────────


def test_report_when_written_then_terminal_and_markdown_have_the_same_numbers() -> None:
    rows = results.compare(outcomes(), COMPARISON)
    matching = results.matching(outcomes(), COMPARISON)
    tables = report.tables_of(rows, matching, COMPARISON, {"toy": 4})
    assert [table.title for table in tables] == [
        "toy, fkl: against flat, 2 training seeds, 4 prompts",
        "toy, fkl: beside it, ROUGE-L by level",
        "fkl: what the arms spend",
    ]
    # The level that is answered best comes first, here the hard one.
    assert tables[1].columns == ("arm", "exact match", "cross entropy", "dev cross entropy", "hard", "easy")
    (flat, pocl), (_, beside), (_, spent) = (table.cells for table in tables)
    assert flat[:2] == ["flat", "36.25 ± 5.30"]
    assert pocl[1] == "43.75 ± 7.07"
    assert str(pocl[2]).startswith("+7.50 [")
    assert pocl[-1] == "50/38/12"
    assert beside == ["pocl", "25.00 ± 0.00", "3.5000", "1.0000", "65.00", "22.50"]
    assert spent == ["pocl", 10, 150, 1.5, "; ".join(matching["fkl"]["pocl"])]
    text = report.markdown("mine", tables, report.notes(COMPARISON, 1))
    assert text.startswith("# mine\n\n## toy, fkl: against flat")
    assert "| flat | 36.25 ± 5.30 | – | – | – | – |" in text
    assert "at least 0.5 with 2" in text


def test_notes_when_there_is_one_seed_then_they_say_what_the_interval_leaves_out() -> None:
    spread, _ = report.notes(make_comparison(seeds=(1,)), 1)
    assert "says nothing of other training seeds" in spread


def test_csv_when_read_back_then_has_a_line_an_arm_with_every_number() -> None:
    rows = results.compare(outcomes(), COMPARISON)
    flat, pocl = csv.DictReader(io.StringIO(report.csv_text(rows)))
    assert (flat["arm"], flat["rouge_l_mean"], flat["rouge_l_difference_mean"]) == ("flat", "36.25", "")
    assert (pocl["rouge_l_difference_wins"], pocl["rouge_l_easy_mean"], pocl["steps"]) == ("4", "22.5", "10")
    assert float(pocl["exact_match_difference_low"]) <= 12.5
