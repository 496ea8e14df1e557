"""A LoRA student through `pocl distill`: what its artifact holds, and what stops it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ConfigError
from pocl_cli.models.load import load_model
from pocl_cli.models.source import resolve_teacher
from pocl_cli.steps import distill
from pocl_cli.steps.chain import Chain

from ..support.recipe import compose, distilled, recipe


def lora_recipe(place: Path, outputs: str, *changes: str) -> list[str]:
    return recipe(place / "inputs", place / outputs, "student.lora.rank=2", "train.lr=1e-2", *changes)


def logits(model: torch.nn.Module) -> torch.Tensor:
    values: torch.Tensor = model.eval()(torch.arange(9)[None]).logits
    return values


def test_student_when_adapters_were_trained_then_is_there_merged_and_as_an_adapter(place: Path) -> None:
    peft = pytest.importorskip("peft")
    run = compose(lora_recipe(place, "outputs"))
    student = distilled(run)
    merged = AutoModelForCausalLM.from_pretrained(student.path / "model", use_safetensors=True)

    chain = Chain(run)
    base = load_model(chain.student, device=torch.device("cpu"), dtype_override=None, dropout=0.0).model
    before = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, student.path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - before).abs().max() > 1e-3
    assert {path.name for path in (student.path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    again = resolve_teacher(run.config.teacher.model_copy(update={"path": str(student.path)}), chain.store)
    assert torch.equal(
        logits(load_model(again, device=torch.device("cpu"), dtype_override=None, dropout=None).model), logits(merged)
    )


def test_student_when_adapters_are_trained_again_then_every_file_has_the_same_bytes(place: Path) -> None:
    pytest.importorskip("peft")
    hashes = []
    for outputs in ("first", "second"):
        folder = distilled(compose(lora_recipe(place, outputs))).path
        files = sorted(path for part in ("adapter", "model") for path in (folder / part).glob("*.*"))
        hashes.append({path.name: sha256_file(path) for path in files if path.name != "README.md"})
    assert hashes[0] == hashes[1]


def test_student_when_the_rank_is_zero_or_null_then_is_the_same_run_and_another_than_with_adapters(place: Path) -> None:
    runs = [compose(lora_recipe(place, "outputs", f"student.lora.rank={rank}")) for rank in (0, "null", 2, 4)]
    keys = [Chain(run).student_key.id for run in runs]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_student_when_peft_is_missing_then_the_error_names_the_extra(place: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"student\.lora needs the package peft.*pip install 'pocl-cli\[peft\]'"):
        distill.run(compose(lora_recipe(place, "missing")))


def test_student_when_processes_share_it_by_fsdp_then_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.lora with hardware\.parallel=fsdp"):
        compose(lora_recipe(place, "outputs", "hardware.num_processes=2", "hardware.parallel=fsdp"))
