from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocl_cli.errors import ArtifactError, PoclError, SecurityError
from pocl_cli.models.folder import INDEX, WEIGHTS, check_model_folder, model_files, tokenizer_files, weight_files


def change_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def shard(folder: Path, *names: str) -> None:
    """Replaces the weights by an index that lists `names`."""
    (folder / WEIGHTS).unlink()
    change_json(folder / INDEX, weight_map={f"w{place}": name for place, name in enumerate(names)})


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def test_check_model_folder_of_what_save_pretrained_wrote_passes(model_folder: Path) -> None:
    check_model_folder(model_folder)
    assert [path.name for path in weight_files(model_folder)] == [WEIGHTS]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), ArtifactError, "it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), ArtifactError, "cannot read config.json"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), ArtifactError, "cannot read config.json"),
        (lambda f: (f / "config.json").write_text("[]"), ArtifactError, "no JSON object"),
        (lambda f: (f / WEIGHTS).unlink(), ArtifactError, "there are no weights"),
        (
            lambda f: (f / "tokenizer.json").unlink() or (f / "tokenizer_config.json").unlink(),
            ArtifactError,
            "no tokenizer",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ArtifactError, "adapter"),
        (lambda f: shard(f, "a.safetensors"), ArtifactError, "weights are missing: a.safetensors"),
        (lambda f: (f / WEIGHTS).unlink() or (f / INDEX).write_text("{}"), ArtifactError, "no weight_map"),
        (pickled, SecurityError, "the weights are pickled"),
        (lambda f: shard(f, "../other.safetensors"), SecurityError, "refused"),
        (lambda f: shard(f, "/etc/weights.safetensors"), SecurityError, "refused"),
        (lambda f: shard(f, "pytorch_model.bin"), SecurityError, "only *.safetensors"),
        (lambda f: change_json(f / "config.json", auto_map={"AutoModel": "code.Model"}), SecurityError, "auto_map"),
        (lambda f: change_json(f / "config.json", text_config={"auto_map": {"A": "b"}}), SecurityError, "auto_map"),
        (lambda f: change_json(f / "tokenizer_config.json", auto_map=["code.T", None]), SecurityError, "auto_map"),
        (lambda f: change_json(f / "config.json", attn_implementation="owner/kernel"), SecurityError, "download"),
        (lambda f: change_json(f / "config.json", transformers_weights="../x.safetensors"), SecurityError, "another"),
    ],
)
def test_check_model_folder_that_is_spoilt_says_what_is_wrong(
    model_folder: Path, spoil: Callable[[Path], object], error: type[PoclError], message: str
) -> None:
    spoil(model_folder)
    with pytest.raises(error) as caught:
        check_model_folder(model_folder)
    assert message in str(caught.value)
    assert str(model_folder) in str(caught.value)
    assert caught.value.fix


def test_check_model_folder_with_pickles_beside_safetensors_passes(model_folder: Path) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    check_model_folder(model_folder)
    assert "pytorch_model.bin" not in {path.name for path in model_files(model_folder)}


def test_check_model_folder_behind_links_as_in_a_hub_cache_passes(model_folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in model_folder.iterdir():
        os.symlink(path, linked / path.name)
    check_model_folder(linked)


def test_model_files_leave_out_what_does_not_decide_the_model(model_folder: Path) -> None:
    for name in ("README.md", "training_args.bin", "code.py", "trainer_state.json"):
        (model_folder / name).write_text("x")
    names = {path.name for path in model_files(model_folder)}
    assert names == {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "name",
    ["vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json", "x.tiktoken", "chat_template.jinja"],
)
def test_tokenizer_files_hold_every_kind_of_vocabulary(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    (tmp_path / "config.json").write_text("{}")
    assert [path.name for path in tokenizer_files(tmp_path)] == [name]
