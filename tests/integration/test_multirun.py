"""Sweeps: a line a job on stdout, one table at the end, and no job that another's failure stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.command import Finished, run_pocl
from ..support.folders import memory_folder
from ..support.recipe import recipe, write_inputs


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        write_inputs(path)
        yield path


def sweep(folder: Path, *words: str) -> Finished:
    overrides = [*recipe(folder, folder / "outputs"), "train.max_steps=3", "train.evaluate_every=0", *words]
    return run_pocl("distill", "-m", *overrides, cwd=folder)


def table(done: Finished) -> dict[str, list[str]]:
    """The rows of the table at the end, by job: the words of the row."""
    _, _, below = done.stderr.rpartition("Sweep\n")
    rows = [line.split() for line in below.splitlines()]
    return {row[0]: row for row in rows if row and row[0].isdigit()}


def test_sweep_when_all_jobs_work_then_each_has_a_line_and_the_same_again_runs_nothing(folder: Path) -> None:
    first = sweep(folder, "kd_method=fkl,rkl", "curriculum.stages=2,3")
    assert first.exit_code == 0, first.stderr
    paths = first.stdout.splitlines()
    assert len(set(paths)) == 4
    assert all((Path(path) / "manifest.json").is_file() for path in paths)
    rows = table(first)
    assert sorted(rows) == ["0", "1", "2", "3"]
    assert all("made" in row for row in rows.values())
    assert {word for row in rows.values() for word in row if word.startswith("kd_method=")} == {
        "kd_method=fkl",
        "kd_method=rkl",
    }
    assert not any("paths.outputs" in word for row in rows.values() for word in row)

    again = sweep(folder, "kd_method=fkl,rkl", "curriculum.stages=2,3")
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert all("reused" in row for row in table(again).values())
    assert "stage 0:" not in again.stderr


def test_sweep_when_a_job_fails_then_the_others_run_and_its_error_comes_last(folder: Path) -> None:
    done = sweep(folder, "dataset.dev_size=7,40,5")
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 2
    assert [row[2] for row in table(done).values()] == ["made", "failed", "made"]
    (line,) = done.errors
    assert line.startswith("pocl: error: job 1: 40 dev rows are asked for")
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr


def test_sweep_when_a_jobs_configuration_is_wrong_then_every_mistake_of_it_is_told(folder: Path) -> None:
    done = sweep(folder, "train.lr=0.01,-1", "train.grad_clip=1,0")
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 1
    assert [line.partition(" — ")[0] for line in done.errors] == [
        "pocl: error: job 1: bad value train.grad_clip=0",
        "pocl: error: job 2: bad value train.lr=-1",
        "pocl: error: job 3: bad value train.lr=-1",
        "pocl: error: job 3: bad value train.grad_clip=0",
    ]


def test_sweep_when_it_does_not_compose_then_all_choices_are_judged_before_a_job_runs(folder: Path) -> None:
    done = sweep(folder, "kd_method=fkl,rkll,sfkll", "train.sed=1")
    assert (done.exit_code, done.stdout) == (2, "")
    assert [line.partition(" — ")[0] for line in done.errors] == [
        "pocl: error: unknown kd_method 'rkll'",
        "pocl: error: unknown kd_method 'sfkll'",
        "pocl: error: unknown key 'train.sed'",
    ]


def test_sweep_when_it_is_interrupted_then_what_was_done_is_shown(folder: Path) -> None:
    words = [*recipe(folder, folder / "outputs"), "train.evaluate_every=0", "train.max_steps=20", "train.seed=11,12,13"]
    done = run_pocl("distill", "-m", *words, cwd=folder, interrupt_at=lambda stderr: "job 1:" in stderr)
    assert done.exit_code == 130
    assert [row[2] for row in table(done).values()] == ["made", "interrupted"]
    assert "interrupted" in done.errors[-1]


def test_log_when_jobs_share_a_process_then_each_has_its_own(folder: Path) -> None:
    done = sweep(folder, "train.seed=21,22")
    assert done.exit_code == 0
    logs = [path.read_text(encoding="utf-8") for path in (folder / "outputs" / "runs").rglob("*-sweep/*/pocl.log")]
    assert sum("train.seed=21" in text for text in logs) == 1
    assert sum("train.seed=22" in text for text in logs) == 1
    assert not any("train.seed=21" in text and "train.seed=22" in text for text in logs)


def test_sweep_when_its_jobs_run_at_once_then_they_share_what_both_need(folder: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra joblib")
    done = sweep(folder, "train.seed=21,22", "difficulty.seed=3", "hydra/launcher=parallel")
    assert done.exit_code == 0, done.stderr
    assert len(set(done.stdout.splitlines())) == 2
    assert [row[2] for row in table(done).values()] == ["made", "made"]
    assert done.stderr.count("Partition, easiest subset first") == 1, "the other job waited for it"


def test_sweep_when_slurm_shall_run_its_jobs_then_the_example_composes(folder: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    words = [*recipe(folder, folder / "outputs"), "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=2"]
    done = run_pocl("distill", "--cfg", "hydra", "-p", "hydra.launcher", *words, cwd=folder)
    assert done.exit_code == 0, done.stderr
    assert "gpus_per_node: 2" in done.stdout
    assert "SlurmLauncher" in done.stdout
