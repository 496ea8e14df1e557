"""Whether `torchrun` or `srun` has started this command in several processes, on one machine or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocl_cli.errors import ConfigError


@dataclass(frozen=True)
class Outer:
    """This process among those that a launcher started.

    Attributes:
        launcher: its name.
        rank: of this process among all.
        size: how many processes there are.
        local_rank: of this process on its machine.
        local_size: how many processes each machine has.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def num_nodes(self) -> int:
        return self.size // self.local_size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check_num_nodes(self, num_nodes: int) -> None:
        """Raises ConfigError where `hardware.num_nodes` is another number than the launcher's."""
        if num_nodes != self.num_nodes:
            raise ConfigError(
                f"hardware.num_nodes={num_nodes}, and {self.launcher} started {self.num_nodes}",
                where=f"{self.size} processes, {self.local_size} on each machine",
                fix=f"set hardware.num_nodes={self.num_nodes}, or start as many machines",
            )


def read_outer(environment: Mapping[str, str]) -> Outer | None:
    """What the launcher's variables say; None where the command was started by itself.

    Raises ConfigError where `srun` started several processes that cannot find each other.
    """
    if "RANK" in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Outer("torchrun", *(int(environment[name]) for name in names))
    # A batch script sees the job's variables; only what srun starts is a step with tasks of its own.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in environment or size == 1:
        return None
    num_nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if size % num_nodes:
        raise ConfigError(f"{size} tasks on {num_nodes} machines", where="srun", fix="use --ntasks-per-node")
    if "MASTER_ADDR" not in environment:
        raise ConfigError(
            "srun does not say where the first process is",
            where="MASTER_ADDR",
            fix='export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun',
        )
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Outer("srun", rank, size, local_rank, size // num_nodes)
