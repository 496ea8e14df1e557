"""From overrides to a checked run: folders of the user's own, recipes, secrets."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pocl_cli.config import (
    Run,
    _UserConfigPath,
    add_user_config,
    compose_run,
    conf_dir,
    user_config_folders,
)
from pocl_cli.mistakes import MultiConfigError

RECIPE = "# @package _global_\ndefaults:\n  - override /teacher: none\n  - override /kd_method: sft\n"


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user's own configuration, on Hydra's search path."""
    for group in ("experiment", "kd_method", "dataset"):
        (tmp_path / group).mkdir()
    add_user_config([str(tmp_path)])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield tmp_path
    _UserConfigPath.folders = ()


@pytest.fixture
def shipped() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(MultiConfigError) as caught:
        compose_run("distill", overrides)
    return [str(error) for error in caught.value.errors]


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compose_run_when_overrides_come_in_another_order_then_the_configuration_is_the_same(shipped: None) -> None:
    overrides = ["kd_method=sfkl", "kd_method.alpha=0.3", "train.lr=0.5", "curriculum=none", "curriculum.stages=2"]
    first, second = compose_run("distill", overrides), compose_run("distill", overrides[::-1])
    assert first.config == second.config
    assert first.resolved == second.resolved


def test_run_when_another_step_is_needed_then_its_command_is_one_for_the_shell(shipped: None) -> None:
    overrides = ["dataset=local", "dataset.path='my rows.jsonl'", "plan.enabled=true"]
    run = compose_run("distill", overrides, options=["--config-dir=my conf"])
    words = shlex.split(run.command_for("partition", "upstream=auto"))
    assert words == ["pocl", "partition", "--config-dir=my conf", *overrides[:2], "upstream=auto"]
    assert run.for_step("score").config is run.config
    assert run.for_step("score").command[1] == "score"


def test_run_when_a_value_is_a_secret_then_neither_values_nor_command_keep_it(
    shipped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecret")
    overrides = [
        "tracker=mlflow",
        "tracker.tracking_uri=https://me:pass-word@host",
        "+student.architecture=null",
        "student.revision=${oc.env:HF_TOKEN}",
        "plan.enabled=true",
    ]
    run = compose_run("distill", overrides)
    assert run.config.student.revision == "hf_SecretSecretSecret"
    kept = repr((run.resolved, run.command))
    assert "SecretSecret" not in kept
    assert "pass-word" not in kept
    assert "***" in kept


def test_compose_run_when_an_interpolation_leads_nowhere_then_its_key_is_named(shipped: None) -> None:
    lines = mistakes("train.lr=${no.such.key}", "train.seed=${oc.env:NO_SUCH_VARIABLE}", "train.max_steps=???")
    assert [line.partition(" — ")[0] for line in lines] == [
        "train.seed has no value",
        "train.lr has no value",
        "train.max_steps has no value",
    ]


def test_compose_run_when_harmless_resolvers_are_used_then_they_work(shipped: None) -> None:
    run = compose_run("distill", ["train.seed=${oc.decode:'12'}", "student.name=${now:%Y}"])
    assert run.config.train.seed == 12
    assert run.config.student.name.isdigit()


# ── the user's own folders ────────────────────────────────────────────────────────────────────────────────────────────


def test_add_user_config_when_an_option_has_a_shipped_name_then_it_shadows_that(user: Path) -> None:
    (user / "kd_method" / "fkl.yaml").write_text("name: fkl\nt_squared: false\n", encoding="utf-8")
    assert compose_run("distill", []).config.kd_method.t_squared is False


def test_add_user_config_when_a_data_set_is_added_then_evaluation_knows_its_name(user: Path) -> None:
    text = "defaults: [local, _self_]\nname: mine\npath: rows.jsonl\nlimit: 3\n"
    (user / "dataset" / "mine.yaml").write_text(text, encoding="utf-8")
    (dataset,) = compose_run("evaluate", ["evaluation.datasets=[mine]"]).config.evaluation.datasets
    assert (dataset.path, dataset.limit, dataset.max_tokens) == ("rows.jsonl", 3, 512)


def test_add_user_config_when_two_folders_have_an_option_then_the_first_wins(tmp_path: Path) -> None:
    for name, stages in (("one", 3), ("two", 5)):
        (tmp_path / name / "experiment").mkdir(parents=True)
        text = f"# @package _global_\ncurriculum: {{stages: {stages}}}\n"
        (tmp_path / name / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    add_user_config([str(tmp_path / "one"), str(tmp_path / "two")])
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            assert compose_run("distill", ["experiment=mine"]).config.curriculum.stages == 3
    finally:
        _UserConfigPath.folders = ()


def test_add_user_config_when_folders_do_not_exist_then_all_are_named(tmp_path: Path) -> None:
    with pytest.raises(MultiConfigError) as caught:
        add_user_config([str(tmp_path / "a"), str(tmp_path), str(tmp_path / "b")])
    assert [error.what for error in caught.value.errors] == [
        f"no configuration folder {tmp_path / name}" for name in ("a", "b")
    ]


def test_user_config_folders_when_the_variable_holds_several_then_empty_ones_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("POCL_CONFIG_PATH", ":/a::/b:")
    assert user_config_folders() == ["/a", "/b"]


def test_experiment_when_it_has_no_package_then_it_is_not_ignored_in_silence(user: Path) -> None:
    (user / "experiment" / "mine.yaml").write_text("train:\n  lr: 0.5\n", encoding="utf-8")
    (line,) = mistakes("experiment=mine")
    assert "'# @package _global_'" in line


# ── recipes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_recipe_when_a_caller_has_overrides_then_only_shared_sections_and_its_own_pass_on(shipped: None) -> None:
    run = compose_run(
        "score",
        [
            "experiment=demo",
            "train.lr=0.5",
            "kd_method=rkl",
            "hardware=auto",
            "hardware.num_threads=3",
            "upstream=auto",
            "paths.outputs=elsewhere",
            'teacher.overrides=["train.lr=0.25"]',
        ],
        options=["--config-dir=x", "--config-name=y"],
    )
    teacher = run.recipe("demo_teacher", ["train.lr=0.25"])
    assert teacher.step == "distill"
    assert (teacher.config.train.lr, teacher.config.kd_method.name) == (0.25, "sft")
    assert (teacher.config.hardware.name, teacher.config.hardware.num_threads) == ("auto", 3)
    assert (teacher.config.upstream, teacher.config.paths.outputs) == ("auto", "elsewhere")
    assert teacher.options == ("--config-dir=x",)
    assert run.recipe("demo_warm_student", []).config.train.lr == 0.004


def test_recipe_when_its_name_is_wrong_then_the_nearest_is_named_before_anything_runs(shipped: None) -> None:
    lines = mistakes("teacher.path=null", "teacher.experiment=demo_techer", 'student.overrides=["a=1"]')
    assert "contradicts itself" in lines[0]
    (line,) = mistakes("teacher.path=null", "teacher.experiment=demo_techer")
    assert "did you mean teacher.experiment=demo_teacher?" in line


def test_recipe_when_it_does_not_hold_then_the_error_says_whose_it_is(shipped: None) -> None:
    wrong = ['teacher.overrides=["train.lr=-1","train.seed=x"]', 'student.overrides=["a.b=1"]']
    lines = mistakes("experiment=demo", *wrong)
    assert [line.partition(" — ")[0] for line in lines] == [
        "bad value train.seed='x' in teacher.experiment=demo_teacher",
        "bad value train.lr=-1 in teacher.experiment=demo_teacher",
        "unknown key 'a.b' in student.experiment=demo_warm_student",
    ]


def test_recipe_when_it_needs_itself_then_the_circle_is_shown(user: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        text = RECIPE + f"student: {{path: null, experiment: {other}}}\n"
        (user / "experiment" / f"{name}.yaml").write_text(text, encoding="utf-8")
    (line,) = mistakes("experiment=one")
    assert "the recipe 'two' needs itself" in line
    assert "two → one → two" in line


def test_recipe_when_asked_for_twice_then_it_is_composed_once(shipped: None) -> None:
    runs = [compose_run("distill", ["experiment=demo", f"train.seed={seed}"]) for seed in (1, 2)]
    teachers: list[Run] = [run.recipe("demo_teacher", []) for run in runs]
    assert teachers[0].config is teachers[1].config


def test_conf_dir_when_installed_in_place_then_it_is_that_of_the_repository() -> None:
    assert (conf_dir() / "distill.yaml").is_file()
    assert not GlobalHydra.instance().is_initialized()
