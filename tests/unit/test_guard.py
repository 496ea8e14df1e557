"""What configuration may not make Hydra run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from pocl_cli.errors import SecurityError
from pocl_cli.guard import guard_compositions, refuse_alias_bombs, refuse_overrides


@pytest.fixture(autouse=True)
def _unguarded_afterwards() -> Iterator[None]:
    load = ConfigLoaderImpl.load_configuration
    guard_compositions()
    yield
    ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def compose_file(folder: Path, text: str, *overrides: str) -> None:
    (folder / "main.yaml").write_text(text, encoding="utf-8")
    with initialize_config_dir(str(folder), version_base="1.3"):
        compose("main", overrides=list(overrides))


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job.name=x",
        "+hydra.callbacks.x._target_=os.system",
        "++hydra.callbacks.x={_target_: os.system}",
        "~hydra.callbacks",
        "hydra/callbacks=x",
        "+hydra/callbacks=x",
        "hydra/job_logging=x",
        "hydra.job_logging.handlers.x.class=os.system",
        "hydra.searchpath=[pkg://x]",
        "hydra.launcher._target_=os.system",
        "hydra.launcher.x={_target_: os.system}",
        "hydra.sweeper.x._target_=os.system",
        "hydra.sweep={_target_: os.system}",
        "hydra.mode=MULTIRUN",
        "hydra={callbacks: {}}",
        " hydra.callbacks.x=1",
        "+hydra/launcher=basic",
    ],
)
def test_override_when_it_could_name_code_then_it_is_refused(override: str) -> None:
    with pytest.raises(SecurityError, match="refused"):
        refuse_overrides(["train.lr=1", override])


@pytest.mark.parametrize(
    "override",
    [
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.launcher.additional_parameters.account=x",
        "hydra/sweeper=basic",
        "hydra.sweeper.max_batch_size=2",
        "hydra.sweep.dir=x",
        "hydra.sweep.subdir=${hydra.job.num}",
        "hydra.run.dir=x",
        "hydra.verbose=true",
        "train.lr=1",
    ],
)
def test_override_when_users_need_it_then_it_passes(override: str) -> None:
    refuse_overrides([override])


FILES = {
    "callback": "hydra: {callbacks: {x: {_target_: os.system, command: id}}}",
    "launcher": "hydra: {launcher: {_target_: os.system}}",
    "nested in the sweeper": "hydra: {sweeper: {params: {x: {_target_: os.system}}}}",
    "by interpolation": "evil: {_target_: os.system}\nhydra: {sweeper: {params: '${evil}'}}",
    "a handler's factory": "hydra: {job_logging: {handlers: {x: {(): os.system}}}}",
    "a handler's class": "hydra: {hydra_logging: {handlers: {x: {class: os.system}}}}",
    "an external object": "hydra: {job_logging: {handlers: {x: {class: logging.StreamHandler, stream: 'ext://os.x'}}}}",
    "a search path": "hydra: {searchpath: ['file:///tmp']}",
    "a program's path": "hydra: {job: {env_set: {PATH: /evil}}}",
    "a preloaded library": "hydra: {job: {env_set: {LD_PRELOAD: /evil.so}}}",
    "a circle": "hydra: {sweeper: {params: '${a}'}}\na: {x: '${b}'}\nb: {x: '${a}'}",
}


@pytest.mark.parametrize("name", FILES)
def test_file_when_it_names_code_then_nothing_is_composed_from_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(SecurityError, match="refused hydra"):
        compose_file(tmp_path, FILES[name])


def test_file_when_a_job_of_a_sweep_composes_it_then_it_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "evil.yaml").write_text("# @package _global_\n" + FILES["callback"], encoding="utf-8")
    (tmp_path / "main.yaml").write_text("defaults: [{optional g: null}]", encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("main", [], RunMode.MULTIRUN)
        with pytest.raises(SecurityError, match=r"refused hydra\.callbacks"):
            loader.load_sweep_config(master, ["g=evil"])


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_file_when_its_aliases_multiply_then_it_is_refused_before_it_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bomb.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SecurityError, match=r"refused YAML aliases in .*bomb\.yaml"):
        refuse_alias_bombs(tmp_path)


@pytest.mark.parametrize("text", ["a: &a [1, 2]\nb: *a\nc: *a\n", "a: [1\nb: *x & y", "", "a: 'x * y & z'\n"])
def test_file_when_its_aliases_are_few_or_it_is_no_yaml_then_it_passes(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    refuse_alias_bombs(tmp_path)


def test_file_when_it_sets_harmless_keys_of_hydra_then_it_composes(tmp_path: Path) -> None:
    text = (
        "hydra: {job: {env_set: {OMP_NUM_THREADS: '1'}}, sweeper: {params: {x: '1,2'}}, run: {dir: '${oc.env:HOME}'}}"
    )
    compose_file(tmp_path, text)


def test_guard_when_set_twice_then_compositions_are_looked_through_once() -> None:
    guarded = ConfigLoaderImpl.load_configuration
    guard_compositions()
    assert ConfigLoaderImpl.load_configuration is guarded
