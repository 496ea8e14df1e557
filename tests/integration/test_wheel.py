"""What `pip install` brings works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pocl_cli.cli import STEPS
from pocl_cli.config import conf_dir

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, in a folder of its own."""
    pytest.importorskip("hatchling", reason="the build backend is an extra: pip install 'pocl-cli[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(PROJECT),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run([*command, "--quiet", "--no-index", "--disable-pip-version-check"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unpacked: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "pocl_cli.cli", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_wheel_when_built_then_it_holds_the_package_and_all_of_conf_and_nothing_else(unpacked: Path) -> None:
    shipped = {path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml")}
    conf = unpacked / "pocl_cli" / "conf"
    assert {path.relative_to(conf) for path in conf.rglob("*") if path.is_file()} == shipped
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"pocl_cli"}
    modules = {path.relative_to(PROJECT) for path in (PROJECT / "pocl_cli").rglob("*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == modules


def test_wheel_when_built_then_it_brings_the_command_and_the_licence(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    assert "pocl = pocl_cli.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")
    assert (info / "licenses" / "LICENSE").is_file()


@pytest.mark.parametrize("step", STEPS)
def test_wheel_when_used_in_another_folder_then_each_step_composes_its_own_configuration(
    unpacked: Path, tmp_path: Path, step: str
) -> None:
    done = run(unpacked, tmp_path, step, "--cfg", "job", "-p", "kd_method.name", "kd_method=sfkl")
    assert (done.returncode, done.stdout, done.stderr) == (0, "sfkl\n", "")
    assert list(tmp_path.iterdir()) == []


def test_wheel_when_its_configuration_is_searched_then_it_is_inside_the_package(unpacked: Path, tmp_path: Path) -> None:
    done = run(unpacked, tmp_path, "score", "--info", "searchpath")
    assert f"file://{unpacked}/pocl_cli/conf" in done.stdout
    wrong = run(unpacked, tmp_path, "score", "kd_method=fkll")
    assert (wrong.returncode, "did you mean kd_method=fkl?" in wrong.stderr) == (2, True)
