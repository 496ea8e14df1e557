"""What the README says works: its commands, its quickstart, its example of a new loss."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hydra import initialize_config_dir
from torch import Tensor

from pocl_cli.config import compose_run, conf_dir
from pocl_cli.registry import Registry

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = sorted(
    {
        line.split("#")[0].split("…")[0].strip()
        for language, block in BLOCKS
        if not language
        for line in block.splitlines()
        if line.startswith("pocl ")
    }
)
SMALL = [
    "teacher.overrides=[dataset.num_rows=600,train.max_steps=20]",
    "student.overrides=[dataset.num_rows=600,train.max_steps=20]",
    "dataset.num_rows=600",
    "train.max_steps=20",
]


@pytest.fixture
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@pytest.mark.usefixtures("_hydra")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_when_composed_then_are_valid(command: str) -> None:
    _, step, *overrides = shlex.split(command)
    if "-m" in overrides:  # the first job of the sweep
        overrides = [word.partition(",")[0] for word in overrides if word != "-m"]
    run = compose_run(step, [word.replace("plan=", "plan.enabled=") for word in overrides])
    assert run.step == step


def test_quickstart_when_its_chain_runs_on_fewer_rows_then_prints_the_student_alone(tmp_path: Path) -> None:
    quickstart = "pocl distill experiment=demo upstream=auto"
    assert quickstart in README
    environment = {**os.environ, "POCL_OUTPUTS": str(tmp_path / "outputs")}
    command = [sys.executable, "-m", "pocl_cli.cli", *shlex.split(quickstart)[1:], *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (student,) = done.stdout.splitlines()
    assert (Path(student) / "model" / "model.safetensors").is_file()
    assert {path.name for path in (tmp_path / "outputs").iterdir()} >= {"scores", "partitions", "students", "runs"}


def test_quickstart_when_its_targets_are_read_then_the_makefile_has_them() -> None:
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_example_loss_when_registered_then_is_zero_at_equality_and_right_elsewhere() -> None:
    (source,) = [block for language, block in BLOCKS if language == "python"]
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    family = Registry("kd_method", "pocl_cli.losses")
    names = {"kd_methods": family, "dataclass": dataclass, "ClassVar": ClassVar, "Tensor": Tensor}
    exec(compile(source, "README.md", "exec"), names)
    method = family.build({"name": "chi2", "t_squared": True})
    p, q = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    assert torch.allclose(method(p, p), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(method(q, p), ((p.exp() - q.exp()) ** 2 / q.exp()).sum(-1))
