from __future__ import annotations

import pytest

from pocl_cli.arguments import read
from pocl_cli.errors import ConfigError, SecurityError


def test_read_when_flags_and_overrides_are_mixed_then_both_are_found_in_order() -> None:
    found = read("distill", ["a=1", "-m", "b=2", "--cfg", "job", "c=3", "-p", "train", "--config-dir", "x", "-cd=y"])
    assert found.overrides == ("a=1", "b=2", "c=3")
    assert found.flags == ("--multirun", "--cfg=job", "--package=train")
    assert found.config_dirs == ("x", "y")
    assert found.multirun


@pytest.mark.parametrize("words", [["-cn", "mine"], ["-cn=mine"], ["--config-name=mine"], ["--config-name", "mine"]])
def test_read_when_a_config_name_is_given_then_any_spelling_will_do(words: list[str]) -> None:
    found = read("score", words)
    assert (found.config_name, found.flags) == ("mine", ("--config-name=mine",))


def test_read_when_it_shall_wait_then_hydra_does_not_see_the_flag() -> None:
    found = read("score", ["a=1", "--wait", "b=2"])
    assert (found.waits, found.flags, found.overrides) == (True, (), ("a=1", "b=2"))
    assert not read("score", ["a=1"]).waits


def test_read_when_info_has_no_kind_then_all_is_meant() -> None:
    assert read("score", ["--info"]).flags == ("--info=all",)
    assert read("score", ["--info", "defaults"]).flags == ("--info=defaults",)


@pytest.mark.parametrize("words", [["plan=true"], ["plan=True"], ["plan.enabled=1"], ["plan=false", "plan='yes'"]])
def test_read_when_a_plan_is_asked_for_then_the_switch_is_written_out(words: list[str]) -> None:
    found = read("distill", words)
    assert found.plans
    assert all(word.startswith("plan.enabled=") for word in found.overrides)


@pytest.mark.parametrize("words", [[], ["plan=false"], ["plan=true", "plan=no"], ["plan.num_rows=3"], ["explan=true"]])
def test_read_when_no_plan_is_asked_for_then_there_is_none(words: list[str]) -> None:
    assert not read("distill", words).plans


def test_read_when_a_ramp_is_a_list_then_its_values_are_meant() -> None:
    words = ["curriculum.temperature=[1,1.2,2]", "curriculum.kd_ratio=[0,1],[1,1]", "curriculum.temperature.end=[1]"]
    assert read("distill", words).overrides == (
        "curriculum.temperature.values=[1,1.2,2]",
        "curriculum.kd_ratio.values=[0,1],[1,1]",
        "curriculum.temperature.end=[1]",
    )
    [inside] = read("distill", ["teacher.overrides=[curriculum.temperature=[1,2],a=1]"]).overrides
    assert inside == 'teacher.overrides=["curriculum.temperature.values=[1,2]","a=1"]'


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("--mutlirun", "did you mean --multirun"),
        ("--config-path=x", "did you mean --config-"),
        ("--train.lr=0.1", "an override has no dashes: train.lr=0.1"),
        ("--kd_method", "an override has no dashes: kd_method=VALUE"),
        ("-z", "flags are --help"),
    ],
)
def test_read_when_a_flag_is_unknown_then_the_right_way_is_named(word: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="unknown flag") as caught:
        read("distill", [word])
    assert fix in str(caught.value)


@pytest.mark.parametrize("words", [["--cfg", "nope"], ["--info", "nope"], ["-p"]])
def test_read_when_a_flags_value_is_wrong_then_it_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="bad flag of pocl distill"):
        read("distill", words)


@pytest.mark.parametrize("words", [["-er", "x.pickle"], ["--experimental-rerun=x.pickle"]])
def test_read_when_a_pickle_is_to_be_read_then_it_is_refused(words: list[str]) -> None:
    with pytest.raises(SecurityError, match="refused --experimental-rerun"):
        read("distill", words)


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        ("teacher.overrides=[train.lr=5e-5]", 'teacher.overrides=["train.lr=5e-5"]'),
        ("student.overrides=[a=1,b=[2,3],c]", 'student.overrides=["a=1","b=[2,3]",c]'),
        ("teacher.overrides=['a=1,2',b={x: 1}]", "teacher.overrides=['a=1,2',\"b={x: 1}\"]"),
        ('teacher.overrides=["a=1"]', 'teacher.overrides=["a=1"]'),
        ("teacher.overrides=[]", "teacher.overrides=[]"),
        ("+comparison.arms.mine=[train.lr=1,b]", '+comparison.arms.mine=["train.lr=1",b]'),
        ("train.lr=[a=1]", "train.lr=[a=1]"),
    ],
)
def test_read_when_overrides_stand_in_a_list_then_hydra_gets_them_quoted(typed: str, read_as: str) -> None:
    assert read("distill", [typed]).overrides == (read_as,)
