"""Pickled weights: only tensors come out of them, and what is written loads as the same model."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocl_cli.errors import ArtifactError, PoclError, SecurityError
from pocl_cli.models.folder import INDEX, PICKLED_INDEX, PICKLED_WEIGHTS, WEIGHTS, check_model_folder
from pocl_cli.models.pickled import convert, read_tensors

Tiny = Callable[..., PreTrainedModel]


def pickle_weights(folder: Path, model: PreTrainedModel, **options: Any) -> None:
    """Puts the weights of `model` into one pickle, in place of what the folder has."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    model.save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    torch.save(model.state_dict(), folder / PICKLED_WEIGHTS, **options)


def in_shards(folder: Path, model: PreTrainedModel) -> None:
    """Spreads them over two pickles and an index."""
    pickle_weights(folder, model)
    tensors = torch.load(folder / PICKLED_WEIGHTS)
    (folder / PICKLED_WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-0000{1 + (place > 5)}-of-00002.bin" for place, name in enumerate(names)}
    for shard in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": weight_map}))


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    weights = other.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "legacy"])
def test_convert_of_one_pickle_gives_the_same_model_with_its_ties(
    model_folder: Path, tmp_path: Path, tiny: Tiny, architecture: str, options: dict[str, Any]
) -> None:
    model = tiny(architecture)
    pickle_weights(model_folder, model, **options)
    assert check_model_folder(model_folder, allow_pickle=True)
    convert(model_folder, tmp_path / "safe")
    assert sorted(path.name for path in (tmp_path / "safe").iterdir()) == [
        "config.json", "generation_config.json", WEIGHTS
    ]  # fmt: skip
    again = loaded(tmp_path / "safe")
    assert same(model, again)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (model, again)]
    assert tied[0] == tied[1]


def test_convert_of_shards_gives_shards_and_the_same_model(model_folder: Path, tmp_path: Path, tiny: Tiny) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    in_shards(model_folder, model)
    convert(model_folder, tmp_path / "safe")
    assert len(list((tmp_path / "safe").glob("model-0000?-of-00002.safetensors"))) == 2
    assert set(json.loads((tmp_path / "safe" / INDEX).read_text())["weight_map"]) == set(model.state_dict())
    assert same(model, loaded(tmp_path / "safe"))


def test_convert_keeps_the_dtype_of_the_checkpoint(model_folder: Path, tmp_path: Path, tiny: Tiny) -> None:
    pickle_weights(model_folder, tiny("llama").bfloat16())
    convert(model_folder, tmp_path / "safe")
    assert {tensor.dtype for tensor in load_file(tmp_path / "safe" / WEIGHTS).values()} == {torch.bfloat16}


class _Opens:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "legacy"])
@pytest.mark.parametrize("variable", ["0", "1"])
def test_read_of_a_pickle_that_holds_code_is_refused_and_runs_none(
    tmp_path: Path, options: dict[str, Any], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    path, canary = tmp_path / "evil.bin", tmp_path / "ran"
    torch.save({"w": torch.zeros(2), "x": _Opens(canary)}, path, **options)
    with pytest.raises(SecurityError, match=r"more than tensors in .*evil\.bin"):
        read_tensors(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()


def cut(size: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * size) if isinstance(size, float) else size])

    return spoil


def packed(path: Path) -> None:
    """The same archive with its entries packed: 64 MiB of zeros in a few KiB."""
    torch.save({"w": torch.zeros(2**24)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 2**20


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (cut(0), ArtifactError, "cannot read the checkpoint"),
        (cut(1), PoclError, "bin"),
        (cut(0.5), ArtifactError, "cannot read the checkpoint"),
        (cut(-1), ArtifactError, "cannot read the checkpoint"),
        (lambda path: path.write_bytes(b"no checkpoint"), PoclError, "bin"),
        (packed, SecurityError, "could unpack to any size"),
        (script, SecurityError, "TorchScript"),
        (lambda path: torch.save([torch.zeros(1)], path), ArtifactError, "list instead of named tensors"),
        (lambda path: torch.save({"a": "text"}, path), ArtifactError, "'a' is a str"),
        (lambda path: torch.save({1: torch.zeros(1)}, path), ArtifactError, "1 is a Tensor"),
        (lambda path: torch.save({"a": torch.zeros(2).to_sparse()}, path), ArtifactError, "layout"),
        (lambda path: torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, path), ArtifactError, "complex64"),
        (lambda path: torch.save({"a": torch.zeros(1).expand(2**40)}, path), SecurityError, "claims"),
        (lambda path: torch.save({"a": torch.empty(2**40, device="meta")}, path), PoclError, "bin"),
    ],
)
def test_read_of_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[PoclError], message: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(64)}, path)
    spoil(path)
    with pytest.raises(error) as caught:
        read_tensors(path)
    assert message in str(caught.value)
    assert caught.value.fix
