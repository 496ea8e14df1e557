"""`pocl env`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from pocl_cli import __version__

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "pydantic", "rouge-score", "safetensors")


def print_environment() -> None:
    """Prints versions, devices and places, one `name: value` a line."""
    import torch

    from pocl_cli.config import conf_dir

    print(f"pocl: {__version__}")
    print(f"python: {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package}: {_version(package)}")
    print(f"cpus: {os.cpu_count()}, torch threads: {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cuda: {', '.join(devices) if devices else 'none'}; mps: {torch.backends.mps.is_available()}")
    print(f"conf: {conf_dir()}")
    print(f"outputs: {Path(os.environ.get('POCL_OUTPUTS', 'outputs')).resolve()}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
