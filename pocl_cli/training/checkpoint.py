"""Checkpoints of a run: whole folders of safetensors and JSON, the newest good one wins.

Beside them lie the best states that they name (`best-<step>.safetensors`), which stay as long as a checkpoint does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.hashing import canonical_json, sha256_file
from pocl_cli.artifacts.manifest import difference
from pocl_cli.errors import ArtifactError, NonFiniteError, ResourceError
from pocl_cli.log import get_logger
from pocl_cli.paths import confined
from pocl_cli.training.parallel import ALONE, Processes
from pocl_cli.training.state import Best, TrainingState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pocl_cli.losses.evolving import MethodState
    from pocl_cli.training.stage_rows import Measured

KEPT = 2

_METHOD_FILE, _MEASURED_FILE = "method.safetensors", "measured.safetensors"

# What reading a damaged file raises; a missing one is a ResourceError where it is hashed.
_DAMAGES = (OSError, ResourceError, NonFiniteError, ValueError, KeyError, TypeError, SafetensorError)


def save(
    folder: Path,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    method_state: MethodState | None = None,
    measured: Measured | None = None,
    processes: Processes = ALONE,
) -> None:
    """Writes `folder/<step>-<stage>/`, then prunes: an old checkpoint goes only after the new one is durable.

    Args:
        folder: of the checkpoints.
        state: where the run stands.
        model: the whole student.
        optimizer: over its parameters; None between stages, where the next one starts with a fresh one.
        method_state: that of a KD method which evolves.
        measured: what the rows of stages were chosen by.
        processes: those that train together, on whom the bytes of the run depend.
    """
    target = folder / f"{state.step:08d}-{state.stage:03d}"
    partial = folder / f".partial-{target.name}"
    for leftover in folder.glob(".partial-*"):
        durable.remove_tree(leftover)
    durable.make_folder(partial)
    durable.write_safetensors(partial / "model.safetensors", model_tensors(model))
    if optimizer is not None:
        durable.write_safetensors(partial / "optimizer.safetensors", _optimizer_tensors(optimizer, model))
    if method_state:
        durable.write_safetensors(partial / _METHOD_FILE, dict(method_state))
    if measured:
        durable.write_safetensors(partial / _MEASURED_FILE, dict(measured))
    files = {path.name: sha256_file(path) for path in sorted(partial.iterdir())}
    record = {"state": state.to_json(), "files": files, "conditions": _conditions(model, processes)}
    durable.write_json(partial / "state.json", {**record, "sha256": _digest(record)})
    durable.remove_tree(target)
    durable.rename(partial, target)
    _prune(folder)


def load_newest(folder: Path, model: nn.Module, processes: Processes = ALONE) -> tuple[TrainingState, Path] | None:
    """Loads the newest whole checkpoint into `model`. None where there is no checkpoint at all.

    Raises:
        ArtifactError: there are checkpoints, and every one is damaged; or the newest whole one was made with other
            library versions, on another device, or with threads or processes in another number or way, which would
            give other bytes.
    """
    checkpoints = _checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            state, conditions = _read(path)
            tensors = load_file(path / "model.safetensors")
        except _DAMAGES as error:
            get_logger().warning("checkpoint %s is damaged (%s); trying the one before it", path.name, error)
            continue
        _refuse_other_conditions(path, conditions, _conditions(model, processes))
        load_model_tensors(model, tensors)
        return state, path
    if checkpoints:
        raise ArtifactError(
            "every checkpoint is damaged",
            where=str(folder),
            why="none matches its recorded sha256",
            fix=_afresh(folder),
        )
    return None


def refuse_other_teacher(folder: Path, source: str | None, stage: int | None = None) -> None:
    """Notes beside the checkpoints of a run where its teacher's hidden states come from, and keeps to it.

    Args:
        folder: of the checkpoints; there may be none yet.
        source: `online` or `stored`, which differ by rounding; None where there is no teacher.
        stage: the one that begins or goes on, where the stages have different teachers.

    Raises:
        ArtifactError: there are checkpoints, and they were made with the other source.
    """
    path = folder / "teacher.json"
    name = "teacher" if stage is None else f"teacher of stage {stage}"
    checkpoints, before = _checkpoints(folder), dict[str, Any]()
    if checkpoints:
        try:
            before = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            before = {"teacher": None}
        # A stage that has not begun has noted nothing.
        noted = before.get(name, source if stage is not None else None)
        _refuse_other_conditions(checkpoints[-1], {name: noted}, {name: source})
    durable.write_json(path, {**before, name: source})


def load_method_state(path: Path, model: nn.Module) -> MethodState:
    """The state of the KD method in a checkpoint folder, on the device of `model`; empty where it has none."""
    file = path / _METHOD_FILE
    if not file.exists():
        return {}
    return load_file(file, device=str(next(model.parameters()).device))


def load_measured(path: Path) -> Measured:
    """What the rows of the stages so far were chosen by, from a checkpoint folder; empty where none was chosen."""
    file = path / _MEASURED_FILE
    return load_file(file) if file.exists() else {}


def newest(folder: Path) -> Path:
    """The folder of the newest checkpoint; there is one."""
    return _checkpoints(folder)[-1]


def load_optimizer(
    path: Path,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    part: Callable[[Tensor, Tensor], Tensor] = lambda parameter, value: value,
) -> None:
    """Restores the optimizer's moments and step counts from a checkpoint folder.

    Args:
        path: of the checkpoint.
        optimizer: over the parameters of `model`.
        model: whose names the state was saved under.
        part: takes of a parameter and a value for the whole of it what the optimizer works on here.
    """
    tensors = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        slots = {key.rpartition("|")[2]: value for key, value in tensors.items() if key.rpartition("|")[0] == name}
        if slots:
            optimizer.state[parameter] = {
                key: part(parameter, value).to(parameter.device, copy=True) for key, value in slots.items()
            }


def save_best(folder: Path, step: int, model: nn.Module) -> str:
    """Writes the weights after `step` beside the checkpoints; their file's sha256, for `Best`."""
    path = _best_file(folder, step)
    durable.write_safetensors(path, model_tensors(model))
    return sha256_file(path)


def best_sha256(folder: Path, step: int) -> str:
    """The sha256 of what `save_best` wrote, for the processes that did not write it."""
    return sha256_file(_best_file(folder, step))


def load_best(folder: Path, best: Best, model: nn.Module) -> None:
    """Loads a best state into `model`. Raises ArtifactError where its file is damaged."""
    path = _best_file(folder, best.step)
    try:
        _check_digest(path, best.sha256)
        tensors = load_file(path)
    except _DAMAGES as error:
        raise ArtifactError(
            "the stage's best state is damaged",
            where=str(path),
            why=str(error),
            fix="the same command goes on from the newest checkpoint that does not need it",
        ) from error
    load_model_tensors(model, tensors)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name; a tied weight appears once. What is frozen never changes."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in every}
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies `tensors` (as `model_tensors` gave them) into the model in place."""
    own = model_tensors(model)
    assert own.keys() == tensors.keys(), f"tensors differ: {sorted(own.keys() ^ tensors.keys())[:3]}"
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read(path: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The state of a checkpoint and the conditions it was made under, once every file of it is as it was written."""
    record = _read_record(path)
    for name, digest in record["files"].items():
        _check_digest(confined(path, name), digest)
    state = TrainingState.from_json(record["state"])
    if state.best is not None:
        _check_digest(_best_file(path.parent, state.best.step), state.best.sha256)
    return state, record["conditions"]


def _read_record(path: Path) -> dict[str, Any]:
    record = json.loads((path / "state.json").read_bytes())
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
        raise ValueError("state.json does not match its sha256")
    return record


def _digest(record: Any) -> str:
    return hashlib.sha256(canonical_json(record).encode()).hexdigest()


def _check_digest(path: Path, digest: str) -> None:
    if sha256_file(path) != digest:
        raise ValueError(f"{path.name} does not match its sha256")


def _conditions(model: nn.Module, processes: Processes) -> dict[str, Any]:
    """What decides the bytes of a run beside its configuration."""
    device = next(model.parameters()).device.type
    return {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "device": device,
        # Sums are split among threads on the CPU only.
        "num_threads": torch.get_num_threads() if device == "cpu" else None,
        "num_processes": processes.size,
        "parallel": processes.parallel,
    }


def _refuse_other_conditions(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before != now:
        raise ArtifactError(
            "the unfinished run was begun under other conditions",
            where=str(path),
            why=f"{', '.join(difference(before, now))}; going on would give other numbers than an undisturbed run",
            fix=(
                "restore them (hardware.num_threads, hardware.num_processes, hardware.parallel, hardware.device, "
                f"teacher.store, the packages), or {_afresh(path.parent)}"
            ),
        )


def _afresh(folder: Path) -> str:
    return f"delete the unfinished run and start it afresh: rm -r {shlex.quote(str(folder.parent))}"


def _prune(folder: Path) -> None:
    """Keeps the newest checkpoints and the best states that they name."""
    checkpoints = _checkpoints(folder)
    for old in checkpoints[:-KEPT]:
        durable.remove_tree(old)
    named = {_best_named_by(path) for path in checkpoints[-KEPT:]}
    for best_file in folder.glob("best-*.safetensors"):
        if best_file not in named:
            durable.remove_file(best_file)


def _best_named_by(path: Path) -> Path | None:
    try:
        best = _read_record(path)["state"]["best"]
    except _DAMAGES:
        return None  # nobody will go on from this checkpoint
    return _best_file(path.parent, best["step"]) if best else None


def _best_file(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir()) if folder.is_dir() else []
