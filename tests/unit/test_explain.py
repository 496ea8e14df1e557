"""Hydra's composition errors, in our words and all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException

from pocl_cli.config import conf_dir
from pocl_cli.errors import SecurityError
from pocl_cli.explain import COMPOSITION_ERRORS, diagnose, explain, options_of


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within it Hydra reads this folder alone; afterwards it is the Hydra of before."""
    state = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_state(state)


def composition_error(folder: Path, text: str) -> Exception:
    """What Hydra raises at a primary configuration with this text."""
    (folder / "main.yaml").write_text(text, encoding="utf-8")
    with reading(folder), pytest.raises(COMPOSITION_ERRORS) as caught:
        compose("main")
    return caught.value


def lines(overrides: Sequence[str], *, sweeps: bool = False) -> list[str]:
    return [str(error) for error in diagnose("distill", overrides, sweeps=sweeps)[0]]


MISTAKES = [
    ("kd_method=fkll", ["unknown kd_method 'fkll'", "did you mean kd_method=fkl?"]),
    ("experiment=paper/gpt2_fkl_pcol", ["did you mean experiment=paper/gpt2_fkl_pocl?"]),
    ("experiment=gpt2_fkl_pocl", ["did you mean experiment=paper/gpt2_fkl_pocl?"]),
    ("teacher=models/smollm2", ["a path or hub id is given with teacher.path=models/smollm2"]),
    ("dataset=./rows.jsonl", ["dataset=local dataset.path=./rows.jsonl"]),
    ("dataset=[dolly,dooly]", ["unknown dataset 'dooly'"]),
    ("kd_method=null", ["'kd_method=null' chooses nothing", "choose one of abkd, akl"]),
    ("+kd_method=rkl", ["write kd_method=rkl"]),
    ("kd_method@foo=fkl", ["unknown key 'kd_method@foo'", "write kd_method=…, without @"]),
    ("teaher=gpt2-xl", ["unknown key 'teaher'", "did you mean 'teacher'?"]),
    ("trian.lr=1", ["unknown key 'trian.lr'", "did you mean 'train.lr'?"]),
    ("lr=1", ["unknown key 'lr'", "did you mean 'train.lr'?"]),
    ("kd_method.temprature=1", ["kd_method has name, t_squared", "did you mean 'curriculum.temperature'?"]),
    ("curriculum.temperature.strat=1", ["did you mean 'curriculum.temperature.start'?"]),
    ("evaluation.seeds.9=1", ["unknown key 'evaluation.seeds.9'", "has 5 entries", "write evaluation.seeds=[…]"]),
    ("evaluation.seeds[0]=1", ["cannot read the override", "an entry of a list is KEY.0"]),
    ("+train.lr=1", ["adds a key that exists", "write train.lr=1"]),
    ("~train.lrr", ["unknown key 'train.lrr'", "did you mean 'train.lr'?"]),
    ("train.lr=[1", ["cannot read the override 'train.lr=[1'"]),
    ("dataset.path=a (1).jsonl", ["quote the value: 'dataset.path=\"a (1).jsonl\"'"]),
    ("kd_method", ["cannot read the override 'kd_method'", "write kd_method=VALUE"]),
    ("kd_method=fkl,rkl", ["several values in 'kd_method=fkl,rkl'", "run it with -m"]),
    ("hydra/launcher=ray", ["unknown hydra/launcher 'ray'", "pip install hydra-ray-launcher"]),
]


@pytest.mark.parametrize(("override", "parts"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_diagnose_when_an_override_is_wrong_then_one_line_names_the_right_one(override: str, parts: list[str]) -> None:
    (line,) = lines([override])
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluation.seeds.0=3"],
        ["+student.architecture={model_type: gpt2}"],
        ["~curriculum.kd_ratio"],
        ["kd_method=sfkl", "kd_method.alpha=0.2"],
        ["kd_method.alpha=0.2", "kd_method=sfkl"],
        ["hydra.run.dir=x", "hydra.verbose=true"],
        ["dataset.path='a (1).jsonl'"],
        ["+train.new=1"],
    ],
)
def test_diagnose_when_overrides_compose_then_there_is_nothing_to_say(overrides: list[str]) -> None:
    errors, cfg = diagnose("distill", overrides, sweeps=False)
    assert errors == []
    assert cfg is not None


def test_diagnose_when_it_is_a_sweep_then_every_choice_is_judged() -> None:
    assert lines(["kd_method=fkl,rkl", "train.seed=range(1,3)"], sweeps=True) == []
    found = lines(["kd_method=fkl,rkll,sfkll", "train.sed=1,2"], sweeps=True)
    assert [line.partition(" — ")[0] for line in found] == [
        "unknown kd_method 'rkll'",
        "unknown kd_method 'sfkll'",
        "unknown key 'train.sed'",
    ]


def test_diagnose_when_many_overrides_are_wrong_then_all_are_told_and_the_good_ones_compose() -> None:
    wrong = [override for override, _ in MISTAKES]
    errors, cfg = diagnose("distill", [*wrong, "train.lr=0.5"], sweeps=False)
    assert len(errors) == len(wrong)
    assert cfg is not None
    assert cfg.train.lr == 0.5


def test_options_of_when_a_group_has_folders_then_their_options_have_slashes() -> None:
    assert {"demo", "paper/gpt2_fkl_pocl"} <= set(options_of("experiment"))
    assert options_of("no_such_group") == []
    assert options_of("train") == []


def test_options_of_when_hydra_reads_another_folder_then_they_are_those_of_that_folder(tmp_path: Path) -> None:
    assert "fkl" in options_of("kd_method")
    (tmp_path / "kd_method").mkdir()
    (tmp_path / "kd_method" / "mine.yaml").write_text("name: mine\n")
    with reading(tmp_path):
        assert options_of("kd_method") == ["mine"]
        assert options_of("kd_method") == ["mine"], "the second answer is the kept one"
    assert "fkl" in options_of("kd_method")


FILES = {
    "bad option": ("defaults: [{kd_method: fkll}]\n", ["unknown kd_method 'fkll'", "did you mean kd_method=fkl?"]),
    "no such file": ("defaults: [other/file]\n", ["no configuration file other/file", "check its name"]),
    "bad group": ("defaults: [_self_, {override /teachr: x}]\n", ["unknown group 'teachr'", "conf/main.yaml"]),
    "bad YAML": ("a: [1\n", ["bad YAML", "main.yaml", "line 2", "mend the file"]),
    "duplicate key": ("a: 1\na: 2\n", ["bad YAML", "duplicate key a"]),
}


@pytest.mark.parametrize("name", FILES)
def test_explain_when_a_file_does_not_compose_then_it_is_named(tmp_path: Path, name: str) -> None:
    text, parts = FILES[name]
    line = str(explain(composition_error(tmp_path, text)))
    assert all(part in line for part in parts), line


def test_explain_when_yaml_asks_for_an_object_then_it_is_refused_for_security(tmp_path: Path) -> None:
    error = composition_error(tmp_path, "a: !!python/object/apply:os.system [id]\n")
    assert isinstance(explain(error), SecurityError)


def test_launcher_when_its_package_is_not_installed_then_the_extra_is_named() -> None:
    error = MissingConfigException("Could not find 'hydra/launcher/submitit_slurm'", missing_cfg_file=None)
    assert "pip install 'pocl-cli[slurm]'" in str(explain(error))
