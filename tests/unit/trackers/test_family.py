"""What every tracker keeps to, and the two small parts that they share."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pocl_cli.errors import ConfigError
from pocl_cli.registry import trackers
from pocl_cli.trackers import numbers, require_package

SETTINGS = {
    "jsonl": {},
    "mlflow": {"tracking_uri": None, "experiment": "pocl"},
    "tensorboard": {},
    "trackio": {"project": "pocl", "space_id": None, "private": True},
    "wandb": {"project": "pocl", "entity": None, "mode": "offline"},
}


def test_family_when_it_is_asked_then_the_settings_above_build_every_member() -> None:
    assert set(SETTINGS) <= set(trackers.names())
    for name, settings in SETTINGS.items():
        assert trackers.build({"name": name, **settings}).name == name


@pytest.mark.parametrize(
    "values",
    [
        {"name": "wandb", "project": "", "entity": None, "mode": "offline"},
        {"name": "wandb", "project": "p", "entity": None, "mode": "disabled"},
        {"name": "mlflow", "tracking_uri": None, "experiment": ""},
        {"name": "jsonl", "project": "p"},
    ],
)
def test_family_when_a_setting_is_wrong_then_it_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        trackers.build(values)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"jsonl"}))
def test_check_when_the_package_is_missing_then_the_error_names_the_extra(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=rf"pip install 'pocl-cli\[{name}\]'") as caught:
        trackers.build({"name": name, **SETTINGS[name]}).check()
    assert caught.value.exit_code == 2


def test_require_package_when_the_module_is_missing_then_the_error_names_module_and_extra() -> None:
    with pytest.raises(ConfigError, match=r"no module 'no_such_module' — pip install 'pocl-cli\[wandb\]'"):
        require_package("no_such_module", extra="wandb")


def test_check_when_it_passes_or_fails_then_no_heavy_module_was_imported() -> None:
    code = (
        "import sys; from pocl_cli.errors import ConfigError; from pocl_cli.registry import trackers\n"
        f"for name, settings in {SETTINGS!r}.items():\n"
        "    try: trackers.build({'name': name, **settings}).check()\n"
        "    except ConfigError: pass\n"
        "heavy = {'torch', 'transformers', 'tensorboard', 'wandb', 'mlflow', 'trackio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jsonl_when_it_tracks_a_run_then_it_leaves_no_file(tmp_path: Path) -> None:
    tracker = trackers.build({"name": "jsonl"})
    tracker.check()
    with tracker.open(tmp_path, "run", {"train": {"seed": 10}}) as run:
        run.log({"step": 1, "loss": 2.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_numbers_when_a_line_holds_other_values_too_then_only_numbers_beside_the_step_are_left() -> None:
    line = {"step": 3, "stage": 0, "loss": 1.5, "name": "x", "dev_rouge_l": None, "flag": True}
    assert numbers(line) == {"stage": 0, "loss": 1.5}
