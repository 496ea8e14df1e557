"""The four commands as a person and a shell script use them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.command import Finished, run_pocl
from ..support.folders import memory_folder
from ..support.recipe import recipe, write_inputs

POCL = f"{sys.executable} -m pocl_cli.cli"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Rows and a teacher, and what the tests of this module make from them."""
    with memory_folder() as path:
        write_inputs(path)
        yield path


def small(folder: Path, *changes: str) -> list[str]:
    """Overrides of a chain that trains for a second."""
    words = [*recipe(folder, folder / "outputs"), "difficulty=rrf", "score.max_new_tokens=4", "train.max_steps=3"]
    return [word for word in words if not word.startswith("upstream=")] + list(changes)


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


# ── the chain ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chain_when_each_error_is_followed_then_the_printed_commands_lead_to_the_student(folder: Path) -> None:
    done: list[Finished] = []
    commands = [shlex.join(["pocl", "distill", *small(folder)])]
    while commands and len(done) < 10:
        done.append(run_pocl(*shlex.split(commands[-1])[1:], cwd=folder))
        if done[-1].exit_code == 0:
            commands.pop()
        else:
            (line,) = done[-1].errors
            commands.append(line.partition("run: ")[2].partition("   (or")[0])
    assert [(shlex.split(one.command)[1], one.exit_code) for one in done] == [
        ("distill", 4),
        ("partition", 4),
        ("score", 0),
        ("partition", 0),
        ("distill", 0),
    ]
    for one in done:
        lines = one.stdout.splitlines()
        assert len(lines) == (one.exit_code == 0)
        assert all((Path(line) / "manifest.json").is_file() for line in lines)


def test_step_when_its_artifact_exists_then_it_answers_the_same_and_writes_nothing(folder: Path) -> None:
    first = run_pocl("distill", *small(folder, "upstream=auto"), cwd=folder)
    artifact = folder / first.stdout.strip()
    before = files_below(artifact)
    again = run_pocl("distill", *small(folder, "upstream=auto", "hardware.num_threads=2"), cwd=folder)
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert files_below(artifact) == before


def test_step_when_it_runs_then_tables_go_to_stderr_and_its_run_folder_keeps_a_log(folder: Path) -> None:
    done = run_pocl("distill", *small(folder, "upstream=auto", "train.seed=7"), cwd=folder)
    assert "Stages" in done.stderr
    logs = [path for path in (folder / "outputs" / "runs").rglob("pocl.log") if "train.seed=7" in path.read_text()]
    assert len(logs) == 1
    assert "step 1: loss" in logs[0].read_text()


def test_steps_when_two_run_in_one_second_then_each_has_its_run_folder(folder: Path) -> None:
    before = len(list((folder / "outputs" / "runs").glob("*/*")))
    for _ in range(2):
        run_pocl("partition", *small(folder, "upstream=auto"), cwd=folder)
    assert len(list((folder / "outputs" / "runs").glob("*/*"))) == before + 2


def test_evaluate_when_answers_come_from_elsewhere_then_no_model_is_needed(folder: Path) -> None:
    (folder / "answers.jsonl").write_text('{"text": "red cat"}\n' * 30, encoding="utf-8")
    words = ["evaluation.predictions=answers.jsonl", "evaluation.datasets=[rows.jsonl]"]
    done = run_pocl("evaluate", *words, f"paths.outputs={folder}/outputs", cwd=folder)
    assert done.exit_code == 0, done.stderr
    metrics = json.loads((Path(done.stdout.strip()) / "metrics.json").read_text())["datasets"]
    assert 0 < metrics["rows"]["exact_match"]["mean"] < 100


@pytest.mark.slow
def test_shell_when_it_captures_the_output_then_the_variable_is_the_path(folder: Path) -> None:
    words = shlex.join(small(folder, "upstream=auto"))
    script = f'run=$({POCL} distill {words}) && ls "$run/manifest.json"'
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("/manifest.json")


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "steps"),
    [([], ["360", "720", "1,072", "1,432"]), (["train.drop_last=true"], ["352", "712", "1,064", "1,424"])],
)
def test_plan_when_the_papers_rows_are_given_then_its_stage_table_is_shown_offline(
    tmp_path: Path, words: list[str], steps: list[str]
) -> None:
    words = ["experiment=paper/gpt2_fkl_pocl", "plan=true", "plan.num_rows=11435", *words]
    done = run_pocl("distill", *words, cwd=tmp_path)
    assert (done.exit_code, done.stdout) == (0, "")
    table = [line.split() for line in done.stderr.splitlines() if line[:6].strip().isdigit()]
    assert [row[3] for row in table] == steps
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sweep", [[], ["-m", "kd_method=fkl,rkl"]])
def test_plan_when_data_and_models_are_there_then_costs_are_shown_and_nothing_is_written(
    folder: Path, tmp_path: Path, sweep: list[str]
) -> None:
    words = [*small(folder, "upstream=auto", f"paths.outputs={tmp_path}/new"), "plan=true", *sweep]
    before = files_below(folder)
    done = run_pocl("distill", *words, cwd=tmp_path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "memory (estimate)" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert files_below(folder) == before


# ── the user's own configuration and code ─────────────────────────────────────────────────────────────────────────────

PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar
from pydantic import Field
from pocl_cli.registry import kd_methods
if TYPE_CHECKING:
    from torch import Tensor

@kd_methods.register("half_tvd")
@dataclass(frozen=True, kw_only=True)
class HalfTotalVariation:
    needs_teacher: ClassVar[bool] = True
    weight: Annotated[float, Field(gt=0)]
    t_squared: bool

    def __call__(self, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
        return self.weight * (student_logprobs_NV.exp() - teacher_logprobs_NV.exp()).abs().sum(dim=-1)
"""


def test_plugin_when_a_package_brings_a_method_then_its_own_keys_are_checked(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "half_tvd.py").write_text(PLUGIN, encoding="utf-8")
    info = tmp_path / "site" / "half_tvd-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half-tvd\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[pocl.plugins]\nhalf_tvd = half_tvd\n", encoding="utf-8")
    (tmp_path / "conf" / "kd_method").mkdir(parents=True)
    text = "name: half_tvd\nweight: 0.5\nt_squared: true\n"
    (tmp_path / "conf" / "kd_method" / "half_tvd.yaml").write_text(text, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}/site:{Path(__file__).parents[2]}"}
    told = []
    for wrong in ("kd_method.weight=-1", "train.lr=-1"):
        command = [*shlex.split(POCL), "distill", "--config-dir", "conf", "kd_method=half_tvd", wrong]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        told.append(done.stderr.splitlines())
    assert [[line.partition(" — ")[0] for line in lines] for lines in told] == [
        ["pocl: error: bad value kd_method.weight=-1"],
        ["pocl: error: bad value train.lr=-1"],
    ]


def test_config_dir_when_a_step_names_another_then_the_command_holds_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my conf" / "difficulty").mkdir(parents=True)
    (tmp_path / "my conf" / "difficulty" / "steep.yaml").write_text("name: rrf\nk: 5\n", encoding="utf-8")
    (tmp_path / "my conf" / "mine.yaml").write_text("defaults: [distill, _self_]\ntrain: {lr: 0.5}\n", encoding="utf-8")
    words = ["-cn", "mine", "--config-dir", "my conf", *small(folder), "difficulty=steep"]
    done = run_pocl("distill", *words, cwd=tmp_path)
    assert done.exit_code == 4
    named = shlex.split(done.errors[0].partition("run: ")[2].partition("   (or")[0])
    assert named[:4] == ["pocl", "partition", "--config-dir=my conf", "--config-name=mine"]
    again = run_pocl(*named[1:], "upstream=auto", cwd=tmp_path)
    assert again.exit_code == 0, again.stderr


def test_config_path_when_the_variable_names_a_folder_then_its_options_are_known(tmp_path: Path) -> None:
    (tmp_path / "kd_method").mkdir()
    (tmp_path / "kd_method" / "fkl.yaml").write_text("name: fkl\nt_squared: false\n", encoding="utf-8")
    env = {"POCL_CONFIG_PATH": str(tmp_path)}
    done = run_pocl("score", "--cfg", "job", "-p", "kd_method.t_squared", cwd=tmp_path, env=env)
    assert (done.exit_code, done.stdout) == (0, "False\n")


# ── secrets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_secrets_when_they_come_by_environment_and_overrides_then_no_file_and_no_line_holds_them(
    folder: Path, tmp_path: Path
) -> None:
    env = {"HF_TOKEN": "hf_SecretSecretSecret"}
    words = [
        *small(folder, f"paths.outputs={tmp_path}/out", "upstream=auto"),
        "student.name=${oc.env:HF_TOKEN}",
        "evaluation.name='https://me:pass-word@host'",
        "train.seed=1,2",
    ]
    done = run_pocl("distill", "-m", *words, cwd=tmp_path, env=env)
    assert done.exit_code == 0, done.stderr
    assert len(list(tmp_path.rglob("manifest.json"))) >= 4
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    texts = {str(path): path.name.encode() + path.read_bytes() for path in kept}
    texts |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    leaks = [name for name, text in texts.items() if b"SecretSecret" in text or b"pass-word" in text]
    assert leaks == []


# ── completion ────────────────────────────────────────────────────────────────────────────────────────────────────────

LINES = {
    "pocl dis": "distill",
    "pocl distill --con": "--config-dir --config-name",
    "pocl distill --cfg ": "job hydra all",
    "pocl distill kd_": "kd_method. kd_method=",
    "pocl distill kd_method=s": "seqkd sfkl sft srkl symkl",
    "pocl distill kd_method=sfkl kd_method.": "kd_method.alpha= kd_method.name= kd_method.t_squared=",
    "pocl distill experiment=paper/gpt2_s": "paper/gpt2_seqkd paper/gpt2_seqkd_pocl paper/gpt2_sfkl"
    " paper/gpt2_sfkl_pocl paper/gpt2_sft paper/gpt2_srkl paper/gpt2_srkl_pocl",
    "pocl distill --config-dir conf experiment=mi": "mine",
}
# Splits a line into words as bash does, and calls the function that bash calls at TAB.
ASK = r"""
complete -p pocl | grep -q -- "-F _pocl"
ask() {
    COMP_LINE=$1 COMP_POINT=${#1}
    read -ra COMP_WORDS <<< "${1//=/ = }"
    [[ $1 == *" " || $1 == *= ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    _pocl
    echo "$1 > ${COMPREPLY[*]}"
}
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_when_tab_is_pressed_in_bash_then_commands_groups_options_and_keys_are_offered(
    tmp_path: Path,
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n", encoding="utf-8")
    (tmp_path / "pocl").write_text(f'#!/bin/sh\nexec {POCL} "$@"\n', encoding="utf-8")
    (tmp_path / "pocl").chmod(0o755)
    script = 'eval "$(pocl --completion bash)"\n' + ASK + "".join(f"ask {shlex.quote(line)}\n" for line in LINES)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert dict(line.split(" > ") for line in done.stdout.splitlines()) == LINES
    assert done.stderr == ""
