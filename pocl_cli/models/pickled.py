"""Weights that exist as a pickle only: read once, tensors only, and written as safetensors.

No other module reads a pickle, and this one does so only where `allow_pickle` asks for it. torch's restricted unpickler
builds tensors and plain containers; it refuses whatever else a file names, before anything of it is called.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from pocl_cli.artifacts import durable
from pocl_cli.artifacts.encoding import SAFETENSORS_NAMES
from pocl_cli.errors import ArtifactError, PoclError, SecurityError
from pocl_cli.models.folder import INDEX, WEIGHTS, settings_files, weight_files

_ARCHIVE = b"PK\x03\x04"
# What the unpickler and the reader of archives raise for a file that is cut or no checkpoint.
_DAMAGE = (EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def convert(folder: Path, target: Path) -> None:
    """Writes the model in `folder`, whose weights are pickled, into `target` with safetensors, without its tokenizer.

    A tensor that several names share is written under each; loading ties them again where the configuration says so.

    Raises:
        SecurityError: a file holds more than tensors, or unpacks to more than its size.
        ArtifactError: a file is damaged, or is no mapping of names to tensors.
        ResourceError: the disk is full.
    """
    pickles = [path for path in weight_files(folder, pickled=True) if path.suffix == ".bin"]
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, path in enumerate(pickles, 1):
        shard = WEIGHTS if len(pickles) == 1 else f"model-{number:05d}-of-{len(pickles):05d}.safetensors"
        tensors = {name: tensor for name, tensor in read_tensors(path).items() if name not in weight_map}
        durable.write_safetensors(target / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(pickles) > 1:
        durable.write_json(target / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    for path in settings_files(folder):
        durable.write_bytes(target / path.name, path.read_bytes())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint by name, mapped from the file where it is an archive. Raises as `convert`."""
    with open(path, "rb") as handle:
        is_archive = handle.read(len(_ARCHIVE)) == _ARCHIVE
    if is_archive:
        _check_archive(path)
    try:
        # `weights_only` is given, so that no environment variable can switch it off.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except UnpicklingError as error:
        raise SecurityError(
            "the pickle holds more than tensors",
            where=str(path),
            why=_reason(error),
            fix="do not use this file; ask its maker for safetensors",
        ) from error
    except _DAMAGE as error:
        raise _damaged(path, _reason(error)) from error
    if not isinstance(content, Mapping):
        raise _damaged(path, f"it holds a {type(content).__name__} instead of named tensors")
    return {name: _checked(name, tensor, path) for name, tensor in content.items()}


def _check_archive(path: Path) -> None:
    """Refuses an archive that torch would not have written: a packed one can fill the memory."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise _damaged(path, _reason(error)) from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise _unsafe(path, "it is a TorchScript program")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise _unsafe(path, f"its entry {entry.filename!r} is packed, and could unpack to any size")


def _checked(name: object, tensor: object, path: Path) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise _damaged(path, f"{name!r} is a {type(tensor).__name__} instead of a tensor")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or dtype not in SAFETENSORS_NAMES:
        raise _damaged(path, f"{name!r} has the layout {tensor.layout} and the dtype {dtype}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise _unsafe(path, f"{name!r} claims {tensor.nbytes} bytes and the file holds fewer")
    return tensor.detach()


def _reason(error: Exception) -> str:
    """The first line of an error that is not torch's advice to switch the restriction off."""
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "WeightsUnpickler" in line]
    text = lines[0].partition("WeightsUnpickler error: ")[2] or lines[0] if lines else str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _unsafe(path: Path, why: str) -> PoclError:
    return SecurityError(
        "the checkpoint is refused", where=str(path), why=why, fix="ask its maker for safetensors, or use another model"
    )


def _damaged(path: Path, why: str) -> PoclError:
    return ArtifactError("cannot read the checkpoint", where=str(path), why=why, fix="copy or download it again")
