"""What the variables of a launcher say."""

from __future__ import annotations

import pytest

from pocl_cli.errors import ConfigError
from pocl_cli.processes.outer import Outer, read_outer

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "first"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "MASTER_ADDR": "first",
}


@pytest.mark.parametrize(("environment", "launcher"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_launcher_when_it_started_several_processes_then_each_knows_its_place(
    environment: dict[str, str], launcher: str
) -> None:
    outer = read_outer(environment)
    assert outer == Outer(launcher, rank=5, size=8, local_rank=1, local_size=4)
    assert (outer.num_nodes, outer.is_first) == (2, False)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        # A batch script of a job with several tasks runs once, before any srun.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},
    ],
)
def test_launcher_when_the_process_is_alone_then_there_is_none(environment: dict[str, str]) -> None:
    assert read_outer(environment) is None


def test_srun_when_it_does_not_say_where_the_first_process_is_then_is_refused_with_the_line_that_does() -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        read_outer({name: value for name, value in SRUN.items() if name != "MASTER_ADDR"})


def test_srun_when_machines_have_different_numbers_of_tasks_then_is_refused() -> None:
    with pytest.raises(ConfigError, match="ntasks-per-node"):
        read_outer({**SRUN, "SLURM_STEP_NUM_TASKS": "7"})


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_num_nodes_when_the_launcher_has_another_number_then_is_refused(num_nodes: int) -> None:
    outer = read_outer(TORCHRUN)
    assert outer is not None
    outer.check_num_nodes(2)
    with pytest.raises(ConfigError, match=r"set hardware\.num_nodes=2"):
        outer.check_num_nodes(num_nodes)
