"""Where the arithmetic happens: device, threads, precision and the size of one forward pass."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pocl_cli.errors import ConfigError, ResourceError
from pocl_cli.log import get_logger

if TYPE_CHECKING:
    from pocl_cli.schema import HardwareConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

# Tokens of one forward pass, padding included. Training keeps activations of all layers, decoding a cache.
_TOKENS_ON_CPU, _TOKENS_ELSEWHERE = 4096, 16384


@dataclass(frozen=True)
class Hardware:
    """The resolved `hardware` section."""

    device: torch.device
    precision: str
    max_tokens_per_micro_batch: int
    objective_memory_mb: int

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 forward passes where the precision asks for them; parameters stay as they are."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@contextmanager
def memory_errors_explained(hardware: Hardware, what: str) -> Iterator[None]:
    """Raises ResourceError with advice in place of an allocation that failed in the body (`what` was under way)."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On the CPU torch raises a plain RuntimeError where an allocation fails.
        if type(error) is RuntimeError and not re.search(r"allocate memory|not enough memory", str(error)):
            raise
        raise ResourceError(
            "out of memory",
            where=f"{what} on {hardware.device}",
            why=str(error).split("\n", 1)[0] or type(error).__name__,
            fix=(
                f"set hardware.max_tokens_per_micro_batch below {hardware.max_tokens_per_micro_batch} or "
                f"hardware.objective_memory_mb below {hardware.objective_memory_mb} (the numbers stay the same), "
                "or student.gradient_checkpointing=true; the same command goes on where it stopped"
            ),
        ) from error


def set_up_hardware(config: HardwareConfig, *, rank: int = 0) -> Hardware:
    """Picks the device and sets the number of threads.

    Args:
        config: the `hardware` section.
        rank: of several processes, each of which gets an accelerator of its own.

    Raises:
        ConfigError: the device is not there.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    if config.num_processes > 1 and device.type != "cpu":
        device = _device(f"{device.type}:{rank}")
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cpu" and config.precision == "bfloat16" and not torch.backends.mkldnn.is_available():
        get_logger().warning("bfloat16 on this CPU is very slow; hardware.precision=float32 is the better choice")
    default = _TOKENS_ON_CPU if device.type == "cpu" else _TOKENS_ELSEWHERE
    return Hardware(device, config.precision, config.max_tokens_per_micro_batch or default, config.objective_memory_mb)


class Memory(NamedTuple):
    """Bytes that a device has, and those that nobody uses now."""

    total: int
    free: int


def memory_of(device: torch.device, *, alone: bool = True) -> Memory:
    """The memory of a device; of the CPU what this process may take of the machine's.

    Args:
        device: the device.
        alone: this process is the one that will use it. Else it takes no place on a GPU to ask what is free there.
    """
    if device.type == "cuda" and alone:
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Memory(total, total)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _number(Path("/sys/fs/cgroup/memory.max"), r"^(\d+)$") or total  # of a container
    available = _number(Path("/proc/meminfo"), r"^MemAvailable: *(\d+) kB$")
    used = _number(Path("/sys/fs/cgroup/memory.current"), r"^(\d+)$") if limit < total else None
    free = min(available * 1024 if available is not None else total, limit - (used or 0))
    return Memory(min(total, limit), max(free, 0))


def _number(path: Path, pattern: str) -> int | None:
    """The number in a file of the system; None where this system has none."""
    try:
        found = re.search(pattern, path.read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _keep_freed_memory() -> None:
    """Makes glibc keep large blocks that are freed, and give them out again.

    By itself it maps every tensor above 32 MiB anew, and the system then clears it page by page: for logits that took
    as long as a quarter of the whole training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if count == 0:
        raise ConfigError(
            f"no device {name!r} on this machine", where="hardware.device", fix="use hardware.device=cpu or auto"
        )
    if number and int(number) >= count:
        raise ConfigError(
            f"no device {name!r} on this machine",
            where="hardware.device",
            why=f"there are {count} of that kind",
            fix=f"use hardware.device={kind}:0",
        )
    return torch.device(name)
