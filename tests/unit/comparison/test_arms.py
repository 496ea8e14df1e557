"""From a comparison's configuration to its runs, and what is refused before one starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import initialize_config_dir
from pydantic import ValidationError

from pocl_cli.comparison import arms
from pocl_cli.comparison.arms import Cell
from pocl_cli.config import compose_run, conf_dir
from pocl_cli.errors import ConfigError
from pocl_cli.mistakes import MultiConfigError
from pocl_cli.registry import describe
from pocl_cli.run import Run

from ...support.comparison import make_comparison

DEMO = ["experiment=demo", "comparison=restarts"]


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def composed(*words: str) -> Run:
    return compose_run("compare", [*DEMO, *words])


def errors_of(*words: str) -> list[str]:
    with pytest.raises(MultiConfigError) as caught:
        arms.expand(composed(*words))
    return [str(error) for error in caught.value.errors]


def test_expand_when_methods_and_seeds_are_named_then_every_arm_runs_with_each() -> None:
    words = ["comparison.methods=[fkl,rkl]", "comparison.seeds=[3,4]", "comparison.only=[none,both]"]
    runs = arms.expand(composed(*words, "train.lr=0.5"))
    assert [one.cell for one in runs] == [
        Cell(method, arm, seed) for method in ("fkl", "rkl") for arm in ("none", "both") for seed in (3, 4)
    ]
    for one in runs:
        config = one.run.config
        assert (config.kd_method.name, config.train.seed, config.train.lr) == (one.cell.method, one.cell.seed, 0.5)
        assert config.curriculum.stages == {"none": 1, "both": 4}[one.cell.arm]
        assert (config.upstream, config.comparison) == ("auto", None)


def test_expand_when_no_method_is_named_then_it_is_the_composed_one_with_its_keys() -> None:
    (one, _) = arms.expand(
        composed("kd_method=sfkl", "kd_method.alpha=0.3", "comparison.seeds=[1]", "comparison.only=[none,both]")
    )
    assert one.cell.method == "sfkl"
    assert describe(one.run.config.kd_method)["alpha"] == 0.3


def test_expand_when_an_arm_refers_to_the_seed_then_it_is_that_of_the_run() -> None:
    words = ["comparison=pocl_vs_controls", "comparison.only=[flat_t1,random]", "comparison.seeds=[5,6,7]"]
    runs = arms.expand(composed(*words))
    seeds = [one.run.config.difficulty.seed for one in runs if one.cell.arm == "random"]
    assert seeds == [5, 6, 7]


def test_expand_when_an_arm_has_a_mistyped_key_then_the_key_the_arm_and_its_file_are_named() -> None:
    lines = errors_of('comparison.arms.both=["curriculm.stages=2","train.lrr=1"]', "comparison.seeds=[1,2]")
    assert [line.partition(" — ")[0] for line in lines] == [
        "unknown key 'curriculm.stages' in arm both of conf/comparison/restarts.yaml",
        "unknown key 'train.lrr' in arm both of conf/comparison/restarts.yaml",
    ]
    assert "did you mean 'curriculum.stages'?" in lines[0]


def test_expand_when_values_of_arms_are_wrong_then_all_are_told() -> None:
    lines = errors_of('comparison.arms.none=["train.lr=-1"]', 'comparison.arms.both=["kd_method=rkll"]')
    assert [line.partition(" — ")[0] for line in lines] == [
        "bad value train.lr=-1 in arm none of conf/comparison/restarts.yaml",
        "unknown kd_method 'rkll' in arm both of conf/comparison/restarts.yaml",
    ]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train.seed=3"], "train.seed is set in the command line"),
        (['comparison.arms.none=["train.seed=3"]'], "train.seed is set in arm none of conf/comparison/restarts.yaml"),
        (["comparison.methods=[rkl]", "kd_method=fkl"], "kd_method is set in the command line"),
        (["comparison.methods=[rkl,sfkll]"], "unknown comparison.methods 'sfkll'"),
    ],
)
def test_expand_when_something_would_be_ignored_then_it_is_refused(words: list[str], part: str) -> None:
    (line,) = errors_of(*words)
    assert line.startswith(part)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["comparison.sedes=[1]"], "did you mean 'comparison.seeds'?"),
        (["comparison.baseline=nonee"], "did you mean 'none'?"),
        (["comparison.only=[optimizer,both]"], "the baseline 'none' is not among the arms"),
        (["evaluation.model=teacher"], "it evaluates the students of its arms"),
    ],
)
def test_compose_when_the_comparison_is_wrong_then_it_is_told_with_the_nearest(words: list[str], part: str) -> None:
    with pytest.raises(MultiConfigError, match=r".") as caught:
        composed(*words)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"arms": {"": (), "flat": ()}}, "an arm is named ''"),
        ({"arms": {"a b": (), "flat": ()}}, "an arm is named 'a b'"),
        ({"arms": {"flat": ()}}, "a comparison needs two arms or more"),
        ({"seeds": (1, 1)}, "seeds holds the same entry twice"),
        ({"methods": ("fkl", "fkl")}, "methods holds the same entry twice"),
        ({"only": ("flat", "poc")}, "did you mean 'pocl'?"),
        ({"steps_of": "poccl"}, "did you mean 'pocl'?"),
        ({"baseline": "nothing"}, "the arms are flat, pocl"),
    ],
)
def test_comparison_when_it_contradicts_itself_then_it_is_refused(changes: dict[str, object], part: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_comparison(**changes)
    assert part in str(caught.value)


def test_with_train_when_given_then_configuration_command_and_manifest_agree() -> None:
    run = compose_run("distill", ["experiment=demo", "train.seed=3"])
    changed = arms.with_train(run, max_steps=77, seed=4)
    assert (changed.config.train.max_steps, changed.config.train.seed) == (77, 4)
    again = compose_run("distill", changed.overrides)
    assert (changed.config, changed.resolved) == (again.config, again.resolved)


@pytest.mark.parametrize("comparison", ["restarts", "pocl_vs_controls"])
def test_expand_when_there_are_many_seeds_then_each_run_is_as_if_composed_by_itself(comparison: str) -> None:
    run = composed(f"comparison={comparison}", "comparison.seeds=[1,2,3,4]")
    for one in arms.expand(run):
        alone = arms.compose_arm(run, one.cell).run
        assert (one.run.config, one.run.resolved) == (alone.config, alone.resolved)
        assert sorted(one.run.overrides) == sorted(alone.overrides)


def test_equal_arms_when_two_lead_to_the_same_student_then_they_are_refused() -> None:
    students = {Cell("fkl", arm, seed): f"{arm[:1]}{seed}" for arm in ("flat", "four", "pocl") for seed in (1, 2)}
    with pytest.raises(ConfigError, match=r"arms are equal: flat and four in conf/comparison/mine\.yaml"):
        arms.refuse_equal_arms(students, "mine")
    arms.refuse_equal_arms({cell: one for cell, one in students.items() if cell.arm != "four"}, "mine")
