"""Checkpoints of a run: whole folders of safetensors and JSON, the newest good one wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ArtifactError
from pocl_cli.log import get_logger
from pocl_cli.training.state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT = 2


def save(folder: Path, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Writes `folder/<step>-<stage>/`, then prunes older ones: an old checkpoint goes only after the new one is durable.

    `optimizer` is None between stages, where the next stage starts with a fresh one.
    """
    target = folder / f"{state.step:08d}-{state.stage:03d}"
    partial = folder / f".partial-{target.name}"
    durable.remove_tree(partial)
    durable.make_folder(partial)
    durable.write_safetensors(partial / "model.safetensors", model_tensors(model))
    if optimizer is not None:
        durable.write_safetensors(partial / "optimizer.safetensors", _optimizer_tensors(optimizer, model))
    files = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
    durable.write_json(partial / "state.json", {"state": state.to_json(), "files": files})
    durable.remove_tree(target)
    durable.rename(partial, target)
    for old in _checkpoints(folder)[:-KEPT]:
        durable.remove_tree(old)


def load_newest(folder: Path, model: nn.Module) -> tuple[TrainingState, Path] | None:
    """Loads the newest whole checkpoint into `model`. None where there is no checkpoint at all.

    Raises:
        ArtifactError: there are checkpoints, and every one is damaged.
    """
    checkpoints = _checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            state = _read_state(path)
            load_model_tensors(model, load_file(path / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            get_logger().warning("checkpoint %s is damaged (%s); trying the one before it", path.name, error)
            continue
        return state, path
    if checkpoints:
        raise ArtifactError(
            "every checkpoint is damaged",
            where=str(folder),
            why="none matches its recorded sha256",
            fix=f"delete the unfinished run and start it afresh: rm -r '{folder.parent}'",
        )
    return None


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Restores the optimizer's moments from a checkpoint folder."""
    tensors = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        slots = {key.rpartition("|")[2]: value for key, value in tensors.items() if key.rpartition("|")[0] == name}
        if slots:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in slots.items()
            }


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied weight appears once."""
    parameters = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in every}
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies `tensors` (as `model_tensors` gave them) into the model in place. Raises KeyError where names differ."""
    own = model_tensors(model)
    if own.keys() != tensors.keys():
        raise KeyError(f"tensors differ: {sorted(own.keys() ^ tensors.keys())[:3]}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read_state(path: Path) -> TrainingState:
    record: dict[str, Any] = json.loads((path / "state.json").read_text())
    for name, digest in record["files"].items():
        if sha256_file(path / name) != digest:
            raise ValueError(f"{name} does not match its sha256")
    return TrainingState.from_json(record["state"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir()) if folder.is_dir() else []
