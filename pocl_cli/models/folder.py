"""What is in a model's folder: which files decide the model, and which ones are refused. Free of torch."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pocl_cli.artifacts.disk import reported
from pocl_cli.errors import ArtifactError, PoclError, SecurityError
from pocl_cli.paths import confined

CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG = "config.json", "generation_config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The only pickles that are ever read, and only where `allow_pickle` is set (`models.pickled`).
PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Everything that a tokenizer of transformers reads.
TOKENIZER_PATTERNS = (
    *("*token*.json", "*vocab*", "merges.txt", "bpe.codes", "dict.txt", "byte_maps.json", "normalizer.json"),
    *("*.model", "tokenizer.model*", "*.tiktoken", "*.tokenizer", "tekken.json", "emoji.json", "word_*.json"),
    "chat_template.jinja",
)
_COMPLETE = "name a folder that save_pretrained wrote, or download the model again"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_SAFE_NAMES, _PICKLED_NAMES = (WEIGHTS, INDEX, ".safetensors"), (PICKLED_WEIGHTS, PICKLED_INDEX, ".bin")
# `attn_implementation: owner/name` makes transformers download a compute kernel, which is code.
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_model_folder(folder: Path, *, shown: str | None = None, allow_pickle: bool = False) -> bool:
    """Refuses a folder that holds no model, or whose files would run code or lead outside.

    Args:
        folder: the local folder.
        shown: its name in error messages.
        allow_pickle: accept pickled weights where there are no others.

    Returns:
        Whether the weights are pickled.

    Raises:
        ArtifactError: a file is missing or damaged.
        SecurityError: only pickled weights, a configuration that names code, an index that leads outside.
    """
    shown = shown or str(folder)
    pickled = check_names(_names(folder), shown, allow_pickle=allow_pickle)
    _refuse_code(_read_json(folder / CONFIG), CONFIG, shown)
    check_tokenizer_folder(folder, shown=shown)
    missing = [path.name for path in weight_files(folder, pickled=pickled) if not path.is_file()]
    if missing:
        raise ArtifactError(
            f"weights are missing: {', '.join(missing[:3])}",
            where=shown,
            why=f"{PICKLED_INDEX if pickled else INDEX} lists them",
            fix="copy or download the model again",
        )
    return pickled


def check_tokenizer_folder(folder: Path, *, shown: str | None = None) -> None:
    """Refuses a folder without a tokenizer, or whose tokenizer would run code. Raises ArtifactError, SecurityError."""
    shown = shown or str(folder)
    if not tokenizer_files(folder):
        raise ArtifactError(
            "there is no tokenizer",
            where=shown,
            why="no tokenizer.json, vocab.json or the like is there",
            fix="save the model's tokenizer into the same folder (tokenizer.save_pretrained)",
        )
    if (folder / TOKENIZER_CONFIG).exists():
        _refuse_code(_read_json(folder / TOKENIZER_CONFIG), TOKENIZER_CONFIG, shown)


def check_names(names: Collection[str], shown: str, *, allow_pickle: bool = False) -> bool:
    """Refuses a listing that is no model with weights that may be read: of a folder, or of a hub's repository.

    Returns whether they are pickled, which only `allow_pickle` accepts.
    """
    if CONFIG not in names:
        adapter = ADAPTER_CONFIG in names
        raise ArtifactError(
            "an adapter is not a whole model" if adapter else "there is no model",
            where=shown,
            why=f"it has no {CONFIG}",
            fix="merge the adapter into its model first" if adapter else "name a folder that save_pretrained wrote",
        )
    if ADAPTER_CONFIG in names:
        raise ArtifactError(
            "a model and an adapter in one place",
            where=shown,
            why=f"{ADAPTER_CONFIG} makes transformers load another model",
            fix=f"merge the adapter into the model, or remove {ADAPTER_CONFIG}",
        )
    if WEIGHTS in names or INDEX in names:
        return False
    if allow_pickle and (PICKLED_WEIGHTS in names or PICKLED_INDEX in names):
        return True
    pickles = sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLES))
    if pickles:
        raise SecurityError(
            "the weights are pickled",
            where=shown,
            why=f"{pickles[0]} can run code when it is read, and there is no {WEIGHTS}",
            fix="where you trust its maker, set teacher.allow_pickle=true (or student.allow_pickle=true): "
            f"{PICKLED_WEIGHTS} is then read once, tensors only, and kept as safetensors; or, on the hub, set revision "
            "to a pull request (refs/pr/N) that adds safetensors",
        )
    raise ArtifactError("there are no weights", where=shown, why=f"it has neither {WEIGHTS} nor {INDEX}", fix=_COMPLETE)


def weight_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The files that hold the weights, safetensors or pickled, with their index where there are several.

    Raises:
        ArtifactError: the index is damaged.
        SecurityError: the index leads outside the folder.
    """
    whole, index, ending = _PICKLED_NAMES if pickled else _SAFE_NAMES
    if (folder / whole).exists():
        return [folder / whole]
    weight_map = _read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ArtifactError(f"{index} has no weight_map", where=str(folder), fix=_COMPLETE)
    shards = [confined(folder, name) for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.name.endswith(ending):
            raise SecurityError(
                f"{index} lists {shard.name!r}", where=str(folder), why=f"only *{ending} files are read", fix=_COMPLETE
            )
    return [folder / index, *shards]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide the tokenizer, by name."""
    names = sorted(name for name in _names(folder) if (folder / name).is_file())
    return [folder / name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER_PATTERNS)]


def model_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The files that decide the model and its tokenizer."""
    return sorted({*settings_files(folder), *weight_files(folder, pickled=pickled), *tokenizer_files(folder)})


def settings_files(folder: Path) -> list[Path]:
    """The configuration of the model and of its generation."""
    return [folder / name for name in (CONFIG, GENERATION_CONFIG) if (folder / name).exists()]


def _names(folder: Path) -> set[str]:
    with reported(folder, "read"):
        return set(os.listdir(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is no JSON object")
    return content


def _damaged(path: Path, why: str) -> PoclError:
    return ArtifactError(f"cannot read {path.name}", where=str(path.parent), why=why, fix=_COMPLETE)


def _refuse_code(content: dict[str, Any], name: str, shown: str) -> None:
    for key, value in _entries(content):
        names_code = key == "auto_map" and bool(value)
        names_kernel = key in _IMPLEMENTATIONS and "/" in str(value)
        if names_code or names_kernel or (key == "transformers_weights" and value):
            why = {"auto_map": "it names Python code to run", "transformers_weights": "it names another weights file"}
            raise SecurityError(
                f"{key} is refused",
                where=f"{shown}/{name}",
                why=why.get(key, "it names code to download"),
                fix="use a model that transformers knows by itself; if it knows this one, remove the key from a copy",
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value
