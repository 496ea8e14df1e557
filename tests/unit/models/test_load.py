from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from pocl_cli.artifacts.store import Store
from pocl_cli.errors import ArtifactError, ConfigError, SecurityError
from pocl_cli.models.load import check_context, context_length, load_model, load_tokenizer, read_config, set_dropout
from pocl_cli.models.source import ModelSource, resolve_student, resolve_teacher
from pocl_cli.models.toy_tokenizer import build_toy_tokenizer
from pocl_cli.schema import StudentConfig, TeacherConfig

Tiny = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
ARCHITECTURE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def teacher(path: Path | str, dtype: str = "auto") -> ModelSource:
    config = TeacherConfig(
        name="t",
        path=str(path),
        experiment=None,
        overrides=(),
        revision=None,
        dtype=dtype,
        allow_pickle=False,
        store=False,
    )
    return resolve_teacher(config, Store(Path("outputs-that-are-not-there")))


def student(**values: Any) -> ModelSource:
    defaults = {
        "name": "s",
        "path": None,
        "experiment": None,
        "overrides": (),
        "revision": None,
        "dtype": "float32",
        "allow_pickle": False,
        "layers": None,
        "architecture": None,
        "tokenizer": None,
        "init_seed": 0,
        "dropout": None,
        "gradient_checkpointing": False,
        "lora": {"rank": None, "alpha": 1, "dropout": 0.0, "target_modules": None},
    }
    return resolve_student(StudentConfig(**{**defaults, **values}), Store(Path("outputs-that-are-not-there")))


def load(source: ModelSource, *, dtype: torch.dtype | None = None, dropout: float | None = None) -> PreTrainedModel:
    return load_model(source, device=CPU, dtype_override=dtype, dropout=dropout).model


def test_load_model_of_a_folder_gives_its_weights_in_evaluation_mode_without_a_network(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    loaded = load_model(teacher(model_folder), device=CPU, dtype_override=None, dropout=None)
    expected = load_file(model_folder / "model.safetensors")
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not loaded.model.training
    assert loaded.label == "tiny-llama"
    assert loaded.context_length == 64


def test_load_model_with_auto_keeps_the_checkpoints_dtype_and_an_override_wins(model_folder: Path, tiny: Tiny) -> None:
    tiny("llama", vocab_size=len(build_toy_tokenizer())).bfloat16().save_pretrained(model_folder)
    assert load(teacher(model_folder)).dtype == torch.bfloat16
    assert load(teacher(model_folder, "float16")).dtype == torch.float16
    assert load(teacher(model_folder), dtype=torch.float32).dtype == torch.float32
    assert load(teacher(model_folder, "float16"), dtype=torch.float64).dtype == torch.float64


def test_load_model_with_layers_prunes_it_and_read_config_says_so(model_folder: Path) -> None:
    source = student(path=str(model_folder), layers=2)
    model = load(source)
    assert len(model.model.layers) == 2
    assert read_config(source).num_hidden_layers == 2


def test_load_model_from_an_architecture_is_seeded_and_takes_a_dtype() -> None:
    first, same, other = (
        load(student(architecture=ARCHITECTURE, tokenizer="toy", init_seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    source = student(architecture=ARCHITECTURE, tokenizer="toy", dtype="bfloat16")
    assert load(source).dtype == torch.bfloat16
    assert load(source, dtype=torch.float32).dtype == torch.float32
    assert read_config(source).vocab_size == len(build_toy_tokenizer())


@pytest.mark.parametrize("cut", [0, 1, 0.5, -1])
def test_load_model_with_truncated_weights_is_an_artifact_error(model_folder: Path, cut: float) -> None:
    path = model_folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut) if isinstance(cut, float) else cut])
    with pytest.raises(ArtifactError, match="cannot load the weights"):
        load(teacher(model_folder))


def test_load_model_with_a_missing_weight_is_refused_and_not_made_random(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 weights of the model are missing.*layers\.1\.mlp\.up_proj"):
        load(teacher(model_folder))


def test_load_model_with_a_weight_of_another_shape_is_refused(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ArtifactError, match="cannot load the weights"):
        load(teacher(model_folder))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_type": "no_such_model"}, ArtifactError, "no_such_model"),
        ({"model_type": "bert"}, ConfigError, "no decoder-only language model"),
        ({"model_type": "t5"}, ConfigError, "no decoder-only language model"),
        ({"hidden_size": "wide"}, ArtifactError, "cannot load config.json"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, SecurityError, "auto_map"),
    ],
)
def test_read_config_that_cannot_be_used_is_refused(
    model_folder: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(error, match=message):
        read_config(teacher(model_folder))


def test_load_model_never_runs_code_that_lies_in_its_folder(model_folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    (model_folder / "custom_generate").mkdir()
    for name in ("modeling_llama.py", "tokenization_llama.py", "custom_generate/generate.py"):
        (model_folder / name).write_text(code)
    load_model(teacher(model_folder), device=CPU, dtype_override=None, dropout=None)
    assert not marker.exists()


def test_load_tokenizer_without_a_pad_token_pads_with_eos(model_folder: Path) -> None:
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(teacher(model_folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == build_toy_tokenizer().eos_token_id


def test_load_tokenizer_without_eos_is_refused(model_folder: Path) -> None:
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(teacher(model_folder))


def test_load_tokenizer_from_a_folder_encodes_as_the_one_that_was_saved(model_folder: Path) -> None:
    text = "Sort the words: plum apple\n\n### Response:\n"
    assert load_tokenizer(teacher(model_folder))(text).input_ids == build_toy_tokenizer()(text).input_ids


def test_load_tokenizer_that_is_damaged_is_an_artifact_error(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ArtifactError, match="cannot load the tokenizer"):
        load_tokenizer(teacher(model_folder))


def test_load_tokenizer_of_an_architecture_from_a_folder_is_that_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    only = tmp_path / "tokenizer"
    only.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, only / name)
    source = student(architecture=ARCHITECTURE, tokenizer=str(only))
    assert load_tokenizer(source).get_vocab() == build_toy_tokenizer().get_vocab()
    assert load(source).config.vocab_size == len(build_toy_tokenizer())


@pytest.mark.parametrize(("more", "expected"), [(None, {1}), (5, {1, 5}), ([5, 6], {1, 5, 6})])
def test_eos_token_ids_are_the_tokenizers_and_the_generation_settings(
    model_folder: Path, more: int | list[int] | None, expected: set[int]
) -> None:
    (model_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    loaded = load_model(teacher(model_folder), device=CPU, dtype_override=None, dropout=None)
    assert loaded.eos_token_ids == expected
    assert loaded.pad_token_id == 0


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("gpt2", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]),
        ("opt", ["dropout", "attention_dropout"]),
        ("llama", ["attention_dropout"]),
        ("phi", ["resid_pdrop", "embd_pdrop", "attention_dropout"]),
        ("gpt_neox", ["hidden_dropout", "attention_dropout"]),
        ("falcon", ["hidden_dropout", "attention_dropout"]),
    ],
)
def test_set_dropout_reaches_every_probability(model_type: str, names: list[str]) -> None:
    config = AutoConfig.for_model(model_type)
    before = config.to_dict()
    set_dropout(config, None)
    assert config.to_dict() == before
    set_dropout(config, 0.25)
    assert [getattr(config, name) for name in names] == [0.25] * len(names)


def test_set_dropout_of_zero_switches_layer_drop_off_and_others_leave_it() -> None:
    config = AutoConfig.for_model("opt", layerdrop=0.1)
    set_dropout(config, 0.3)
    assert config.layerdrop == 0.1
    set_dropout(config, 0.0)
    assert config.layerdrop == 0.0


def test_set_dropout_where_the_architecture_has_none_is_refused() -> None:
    config = AutoConfig.for_model("mamba")
    set_dropout(config, 0.0)
    with pytest.raises(ConfigError, match="has no effect"):
        set_dropout(config, 0.1)


def test_load_model_with_dropout_zero_gives_the_same_twice_in_training_mode(model_folder: Path, tiny: Tiny) -> None:
    tiny("gpt2", vocab_size=len(build_toy_tokenizer())).save_pretrained(model_folder)
    tokens = torch.tensor([[3, 4, 5, 6]])
    for dropout, same in ((0.0, True), (None, False)):
        model = load(teacher(model_folder), dropout=dropout).train()
        assert torch.equal(model(tokens).logits, model(tokens).logits) == same


@pytest.mark.parametrize(("model_type", "bound"), [("llama", 64), ("gpt2", 64), ("opt", 64), ("gpt_neo", 64)])
def test_check_context_refuses_what_does_not_fit(tiny: Tiny, model_type: str, bound: int) -> None:
    config = tiny(model_type).config
    assert context_length(config) == bound
    check_context(config, bound)
    with pytest.raises(ConfigError, match=f"{bound + 1} tokens do not fit"):
        check_context(config, bound + 1)


def test_check_context_of_a_model_without_a_bound_allows_everything() -> None:
    config = AutoConfig.for_model("bloom")
    assert context_length(config) is None
    check_context(config, 10**6)
