"""Behaviour of the shipped difficulty measurers, and what every registered one promises."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from pocl_cli.errors import ArtifactError, NonFiniteError
from pocl_cli.records import ScoredRecord
from pocl_cli.registry import difficulty_measurers

from ...support.scores import make_scores

CONF = Path(__file__).parents[3] / "conf" / "difficulty"
PAPERS = [{"name": "rouge_l", "weight": 1.0}, {"name": "cross_entropy", "weight": 1.0}]
SHIPPED: dict[str, dict[str, Any]] = {
    "rrf": {"name": "rrf", "k": 60, "members": PAPERS},
    "mean_rank": {"name": "mean_rank", "members": PAPERS},
    "ifd": {"name": "ifd"},
    "length": {"name": "length", "part": "response"},
    "teacher_gap": {"name": "teacher_gap"},
    "attention": {"name": "attention"},
    "rouge_l": {"name": "rouge_l"},
    "cross_entropy": {"name": "cross_entropy"},
    "random": {"name": "random", "seed": 10},
}


def _row(record_id: str, rouge_l: float | None, cross_entropy: float) -> ScoredRecord:
    return ScoredRecord(
        id=record_id,
        num_prompt_tokens=5,
        num_response_tokens=3,
        cross_entropy=cross_entropy,
        rouge_l=rouge_l,
        cross_entropy_alone=3.5,
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


@pytest.mark.parametrize("name", ["rrf", "mean_rank", "rouge_l", "cross_entropy", "ifd", "teacher_gap"])
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


def test_rrf_when_members_are_left_out_then_is_the_papers() -> None:
    assert difficulty_measurers.build({"name": "rrf", "k": 60}) == _measurer("rrf")
    assert difficulty_measurers.build({"name": "rrf", "k": 60, "members": ["rouge_l", "cross_entropy"]}) == _measurer(
        "rrf"
    )


def test_rrf_when_members_have_weights_then_each_counts_so_much() -> None:
    # ROUGE-L ranks 1, 2.5, 2.5, 4; the others' ranks are all 2.5, as their lengths are equal.
    length = {"name": "length", "part": "response", "weight": 0.5}
    difficulty = _measurer("rrf", k=0, members=[{"name": "rouge_l", "weight": 3}, length])(make_scores(ROWS))
    assert difficulty == pytest.approx([-(3 / rank + 0.5 / 2.5) for rank in (1, 2.5, 2.5, 4)], abs=1e-15)


def test_mean_rank_when_members_have_weights_then_is_their_weighted_mean() -> None:
    # ROUGE-L ranks 1, 2.5, 2.5, 4; cross-entropy ranks 1, 4, 2.5, 2.5.
    assert _measurer("mean_rank")(make_scores(ROWS)).tolist() == [1, 3.25, 2.5, 3.25]
    members = [{"name": "rouge_l", "weight": 3}, "cross_entropy"]
    assert _measurer("mean_rank", members=members)(make_scores(ROWS)).tolist() == [1, 2.875, 2.5, 3.625]


def test_fusion_when_a_member_is_a_fusion_then_its_order_is_fused() -> None:
    inner = {"name": "mean_rank", "members": ["rouge_l", "cross_entropy"]}
    measurer = _measurer("mean_rank", members=[inner, "teacher_gap"])
    assert measurer.needs == {"rouge_l", "cross_entropy", "teacher_cross_entropy"}
    # The gap is the cross entropy less 0.5 everywhere: ranks 1, 3.5, 2, 3.5 and 1, 4, 2.5, 2.5.
    assert measurer(make_scores(ROWS)).tolist() == [1, 3.75, 2.25, 3]


def test_ifd_when_the_prompt_helps_then_is_below_one() -> None:
    rows = [_row("helps", 0.0, 3.5 - math.log(4)), _row("does nothing", 0.0, 3.5), _row("harms", 0.0, 4.5)]
    assert _measurer("ifd")(make_scores(rows)) == pytest.approx([0.25, 1, math.e])


def test_length_when_a_part_is_chosen_then_counts_its_tokens() -> None:
    rows = make_scores([replace(ROWS[0], num_prompt_tokens=7, num_response_tokens=2)])
    assert [_measurer("length", part=part)(rows)[0] for part in ("prompt", "response", "both")] == [7, 2, 9]


def test_teacher_gap_when_both_models_find_a_row_hard_then_it_is_not() -> None:
    scores = make_scores(ROWS)
    theirs = pa.array([0.5, 3.0, 0.5, 1.5])
    place = scores.table.column_names.index("teacher_cross_entropy")
    table = scores.table.set_column(place, "teacher_cross_entropy", theirs)
    assert _measurer("teacher_gap")(replace(scores, table=table)).tolist() == [0.5, 0.0, 1.5, 0.5]


def test_attention_when_the_student_looks_widely_then_the_row_is_hard() -> None:
    scores = make_scores(ROWS)
    place = scores.table.column_names.index("attention_variance")
    table = scores.table.set_column(place, "attention_variance", pa.array([0.02, 0.0, 0.01, 0.01]))
    measured = replace(scores, table=table)
    assert _measurer("attention")(measured).tolist() == [-0.02, 0.0, -0.01, -0.01]
    # Ranks 1, 4, 2.5, 2.5, and those of the cross entropy: 1, 4, 2.5, 2.5.
    fused = _measurer("mean_rank", members=["attention", {"name": "cross_entropy", "weight": 3}])
    assert fused.needs == {"attention_variance", "cross_entropy"}
    assert fused(measured).tolist() == [1, 4, 2.5, 2.5]


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
        ({"name": "length", "part": "all"}, "'prompt', 'response' or 'both'"),
        ({"name": "mean_rank", "members": []}, "at least 1"),
        ({"name": "mean_rank", "members": ["rouge"]}, "unknown difficulty 'rouge'.*did you mean 'rouge_l'"),
        ({"name": "mean_rank", "members": ["length"]}, "member 'length' of the fusion is wrong: part: .*equired"),
        ({"name": "mean_rank", "members": [{"name": "ifd", "weight": 0}]}, "the weight of 'ifd' is 0"),
        ({"name": "mean_rank", "members": [{"name": "ifd", "weight": math.nan}]}, "a number above 0"),
        ({"name": "mean_rank", "members": [{"weight": 1}]}, "no difficulty is chosen"),
    ],
)
def test_configuration_when_wrong_then_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        difficulty_measurers.build(values)


def test_needs_when_a_metric_is_unused_then_it_is_not_required() -> None:
    assert {name: set(_measurer(name).needs) for name in SHIPPED} == {
        "mean_rank": {"rouge_l", "cross_entropy"},
        "ifd": {"cross_entropy", "cross_entropy_alone"},
        "length": {"num_prompt_tokens", "num_response_tokens"},
        "teacher_gap": {"cross_entropy", "teacher_cross_entropy"},
        "attention": {"attention_variance"},
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
