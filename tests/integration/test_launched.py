"""Commands that a launcher starts in several processes: `torchrun` on two machines, tasks of `srun`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support.command import Running, run_pocl, start_pocl
from ..support.folders import memory_folder
from ..support.recipe import recipe, write_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU cannot fork")

TWO_MACHINES = ("hardware=cpu_2", "hardware.num_nodes=2", "hardware.num_processes=1", "hardware.timeout_seconds=30")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        write_inputs(folder / "inputs")
        yield folder


def words(folder: Path, outputs: str, *changes: str) -> list[str]:
    return recipe(folder / "inputs", folder / outputs, "student.dropout=0", *changes)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def tasks(folder: Path, step: str, *overrides: str) -> list[Running]:
    """Two processes with the variables of `srun` on two machines."""
    port = str(free_port())
    return [
        start_pocl(
            step,
            *overrides,
            cwd=folder,
            env={
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]


def losses(artifact: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_torchrun_when_it_starts_a_run_on_two_machines_then_both_take_part_and_the_first_tells(folder: Path) -> None:
    alone = run_pocl("distill", *words(folder, "alone"), cwd=folder)
    assert alone.exit_code == 0, alone.stderr
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    machines = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", "-m", "pocl_cli", "distill", *words(folder, "launched", *TWO_MACHINES)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [machine.communicate(timeout=100) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    (first, _), (second, quiet) = told
    assert second == ""
    assert "step 24" not in quiet, "only the first process logs"
    artifact = Path(first.strip())
    assert artifact.name == Path(alone.stdout.strip()).name
    for one, two in zip(losses(folder / alone.stdout.strip()), losses(artifact), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert len(list((folder / "launched" / "runs").glob("*/*"))) == 1, "only the first process keeps a log"


def test_srun_when_it_starts_every_step_then_the_tasks_share_them_and_end_with_the_first(folder: Path) -> None:
    changes = ("score.max_new_tokens=4", "difficulty=cross_entropy", *TWO_MACHINES)
    first, second = tasks(folder, "distill", *words(folder, "tasks", *changes))
    made, followed = first.wait(), second.wait()
    assert (made.exit_code, followed.exit_code) == (0, 0), made.stderr + followed.stderr
    assert (followed.stdout, followed.stderr) == ("", "")
    assert (folder / made.stdout.strip() / "manifest.json").exists()
    assert len(list((folder / "tasks" / "scores").glob("small-*"))) == 1, "upstream work was shared too"

    again, followed_again = (one.wait() for one in tasks(folder, "distill", *words(folder, "tasks", *changes)))
    assert again.stdout == made.stdout
    assert (again.exit_code, followed_again.exit_code) == (0, 0)


def test_tasks_when_training_is_not_finite_then_the_first_tells_and_both_have_its_exit_code(folder: Path) -> None:
    first, second = tasks(folder, "distill", *words(folder, "infinite", "train.lr=1e30", *TWO_MACHINES))
    told, followed = first.wait(), second.wait()
    assert (told.exit_code, followed.exit_code) == (7, 7), told.stderr + followed.stderr
    assert len(told.errors) == 1
    assert "the loss is nan" in told.errors[0]
    assert followed.errors == []


def test_tasks_when_one_is_killed_then_the_first_ends_with_a_line_that_says_so(folder: Path) -> None:
    changes = ("curriculum.epochs_per_stage=200", "train.evaluate_every=0", *TWO_MACHINES)
    first, second = tasks(folder, "distill", *words(folder, "killed", *changes))
    killed: list[int] = []

    def kill() -> None:
        if not killed and "stage 0" in first.stderr:
            killed.append(second.pid)
            os.kill(second.pid, signal.SIGKILL)

    told = first.wait(meanwhile=kill)
    assert second.wait().exit_code == -signal.SIGKILL
    assert told.exit_code == 8, told.stderr
    assert len(told.errors) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("-m", "train.seed=1,2"), "it starts jobs by itself"),
        (("hardware=cpu_2",), "hardware.num_nodes=1, and torchrun started 2"),
        (("train.lrr=1",), "train.lrr"),
    ],
)
def test_configuration_when_it_does_not_suit_the_launcher_then_the_first_process_says_so_and_all_end(
    folder: Path, rank: int, changes: tuple[str, ...], reason: str
) -> None:
    launched = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    finished = run_pocl("distill", *words(folder, "refused", *changes), cwd=folder, env=launched)
    assert finished.exit_code == 2, finished.stderr
    assert [reason in error for error in finished.errors] == [True] * (1 - rank)


def test_num_nodes_when_nothing_starts_the_other_machines_then_the_command_says_how(folder: Path) -> None:
    finished = run_pocl("distill", *words(folder, "one machine", *TWO_MACHINES), cwd=folder)
    assert finished.exit_code == 2
    assert "torchrun --nnodes=2" in finished.errors[0]
