"""Behaviour of the shipped difficulty measurers, and what every registered one promises."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from pocl_cli.errors import ArtifactError, NonFiniteError
from pocl_cli.records import ScoredRecord
from pocl_cli.registry import difficulty_measurers

from ...support.scores import make_scores

CONF = Path(__file__).parents[3] / "conf" / "difficulty"
SHIPPED = {
    "rrf": {"name": "rrf", "k": 60},
    "rouge_l": {"name": "rouge_l"},
    "cross_entropy": {"name": "cross_entropy"},
    "random": {"name": "random", "seed": 10},
}


def _row(record_id: str, rouge_l: float | None, cross_entropy: float) -> ScoredRecord:
    return ScoredRecord(
        id=record_id, num_prompt_tokens=5, num_response_tokens=3, cross_entropy=cross_entropy, rouge_l=rouge_l
    )


ROWS = [_row("a", 0.9, 1.0), _row("b", 0.5, 3.0), _row("c", 0.5, 2.0), _row("d", 0.0, 2.0)]


def _measurer(name: str, **changes: Any) -> Any:
    return difficulty_measurers.build({**SHIPPED[name], **changes})


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_yaml_when_built_then_is_the_documented_member(name: str) -> None:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values == SHIPPED[name]
    assert difficulty_measurers.build(values).name == name


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_difficulty_when_rows_are_shuffled_then_follows_the_rows(name: str) -> None:
    measurer = _measurer(name)
    difficulty = measurer(make_scores(ROWS))
    assert difficulty.dtype == np.float64
    assert difficulty.shape == (len(ROWS),)
    order = [2, 0, 3, 1]
    assert measurer(make_scores([ROWS[position] for position in order])).tolist() == difficulty[order].tolist()


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_difficulty_when_there_are_no_rows_then_is_empty(name: str) -> None:
    assert _measurer(name)(make_scores([])).shape == (0,)


@pytest.mark.parametrize("name", ["rrf", "rouge_l", "cross_entropy"])
def test_difficulty_when_a_row_is_better_in_every_metric_then_it_is_easier(name: str) -> None:
    easy, hard = _measurer(name)(make_scores([_row("easy", 0.8, 1.0), _row("hard", 0.2, 4.0)]))
    assert easy < hard


def test_rrf_when_values_tie_then_they_share_the_mean_rank() -> None:
    # ROUGE-L ranks 1, 2.5, 2.5, 4; cross-entropy ranks 1, 4, 2.5, 2.5.
    expected = [-2 / 61, -(1 / 62.5 + 1 / 64), -2 / 62.5, -(1 / 64 + 1 / 62.5)]
    assert _measurer("rrf")(make_scores(ROWS)) == pytest.approx(expected, abs=1e-15)


def test_rrf_when_k_grows_then_the_mean_rank_beats_the_single_best_one() -> None:
    # ROUGE-L and cross-entropy ranks: split 1 and 5, even 2 and 2.
    others = [_row("x", 0.3, 1.0), _row("y", 0.2, 3.0), _row("z", 0.1, 4.0)]
    rows = make_scores([_row("split", 0.9, 9.0), _row("even", 0.5, 2.0), *others])
    split, even = _measurer("rrf", k=0)(rows)[:2]
    assert split < even
    split, even = _measurer("rrf", k=1e6)(rows)[:2]
    assert even < split


def test_rrf_when_all_rows_tie_then_all_difficulties_are_equal() -> None:
    difficulty = _measurer("rrf")(make_scores([_row(str(index), 0.0, 2.0) for index in range(7)]))
    assert len(set(difficulty.tolist())) == 1


def test_random_when_seeded_then_is_uniform_repeatable_and_another_with_another_seed() -> None:
    rows = make_scores([_row(f"{index:016x}", None, math.nan) for index in range(4000)])
    first = _measurer("random")(rows)
    assert first.tolist() == _measurer("random")(rows).tolist()
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(first, _measurer("random", seed=20)(rows))[0, 1]) < 0.06


def test_random_when_computed_then_has_the_bytes_of_every_machine() -> None:
    # The first 53 bits of sha256("10:a"), as a fraction; another value would move every random partition.
    [value] = _measurer("random")(make_scores([_row("a", None, 0.0)]))
    assert value == 0.6010177685610055


@pytest.mark.parametrize("name", ["rrf", "rouge_l"])
def test_difficulty_when_rouge_was_not_measured_then_names_the_rows(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"1 of 4 rows have no rouge_l.*first of them: b") as raised:
        _measurer(name)(make_scores([ROWS[0], replace(ROWS[1], rouge_l=None), *ROWS[2:]]))
    assert raised.value.exit_code == 4


def test_column_when_the_scores_do_not_have_it_then_names_those_that_they_have() -> None:
    with pytest.raises(ArtifactError, match=r"no column 'ifd' in the scores.*there are id, num_prompt_tokens"):
        make_scores(ROWS).column("ifd")


def test_column_when_it_counts_then_is_float64() -> None:
    assert make_scores(ROWS).column("num_prompt_tokens").tolist() == [5.0] * 4
    assert make_scores(ROWS).column("num_prompt_tokens").dtype == np.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rrf", "cross_entropy"])
def test_difficulty_when_a_measurement_is_not_finite_then_names_the_rows(name: str, bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"cross_entropy of 1 of 4 rows.*rows c") as raised:
        _measurer(name)(make_scores([*ROWS[:2], replace(ROWS[2], cross_entropy=bad), ROWS[3]]))
    assert raised.value.exit_code == 7


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"name": "rrf"}, "k"),
        ({"name": "rrf", "k": -1}, "greater than or equal to 0"),
        ({"name": "rrf", "k": math.inf}, "finite"),
        ({"name": "rrf", "k": 60, "kk": 1}, "kk"),
        ({"name": "random", "seed": "many"}, "integer"),
    ],
)
def test_configuration_when_wrong_then_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        difficulty_measurers.build(values)


def test_needs_when_a_metric_is_unused_then_it_is_not_required() -> None:
    needs = {name: set(difficulty_measurers.get(name).needs) for name in SHIPPED}  # type: ignore[attr-defined]
    assert needs == {
        "rrf": {"rouge_l", "cross_entropy"},
        "rouge_l": {"rouge_l"},
        "cross_entropy": {"cross_entropy"},
        "random": set(),
    }


def test_families_when_imported_for_configuration_then_load_no_heavy_library() -> None:
    code = (
        "import sys; from pocl_cli.registry import difficulty_measurers as d, schedulers as s; d.names(); s.names();"
        "print(sorted({'torch', 'transformers', 'datasets', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONF.parents[1])
    assert done.stdout.strip() == "[]"
