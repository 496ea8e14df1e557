"""Low-rank adapters: what is trained, against LoRA written out by hand, and what is left when they are merged."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ConfigError, Interrupted
from pocl_cli.models.attention import recompute_layers
from pocl_cli.models.head import split_model
from pocl_cli.models.lora import Adapters
from pocl_cli.schema import LoraConfig
from pocl_cli.training.checkpoint import model_tensors
from pocl_cli.training.loop import TrainingJob, train
from pocl_cli.training.objective import collate
from pocl_cli.training.student import StudentWithObjective

from ...support.training import STUDENT, TEACHER, make_job, make_model, make_student, toy_rows

pytest.importorskip("peft")

RANK, ALPHA = 2, 3
ARCHITECTURES = {"gpt2, tied, Conv1D": STUDENT, "llama, untied": TEACHER}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": None, **changes})


def adapted(model: PreTrainedModel, **changes: Any) -> Adapters:
    """Adapters that change something: the second matrix of each begins as zeros."""
    adapters = Adapters(model, lora(**changes), seed=5)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return adapters


def pairs(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The two matrices of each adapter by the name of its layer."""
    parameters = dict(model.named_parameters())
    first, second = ".lora_A.default.weight", ".lora_B.default.weight"
    names = [name.removesuffix(first) for name in parameters if name.endswith(first)]
    return {name: (parameters[name + first], parameters[name + second]) for name in names}


def with_model(student: StudentWithObjective, model: PreTrainedModel) -> StudentWithObjective:
    return StudentWithObjective(
        split_model(model),
        method=student.method,
        teacher=student.teacher,
        num_real_tokens=student.num_real_tokens,
        hardware=student.hardware,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_when_there_are_adapters_then_are_those_of_lora_written_out(architecture: str) -> None:
    # Written out: the weight is W + (alpha / rank)·B·A, so that the chain rule gives dA = s·Bᵀ·dW and dB = s·dW·Aᵀ.
    model = make_model(ARCHITECTURES[architecture], 1, dtype=torch.float64)
    plain = copy.deepcopy(model)
    adapted(model)
    scale = ALPHA / RANK
    layers = {name: plain.get_submodule(name) for name in pairs(model)}
    with torch.no_grad():
        for name, (a_rI, b_Or) in pairs(model).items():
            product_OI = scale * b_Or @ a_rI
            layers[name].weight += product_OI.T if isinstance(layers[name], Conv1D) else product_OI
    losses = []
    student = make_student("fkl", dtype=torch.float64)
    for one in (model, plain):
        output = with_model(student, one)(collate(toy_rows(4)), temperature=2.0, kd_ratio=0.7, normaliser=10.0)
        output.loss.backward()
        losses.append(float(output.loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, (a_rI, b_Or) in pairs(model).items():
        gradient = layers[name].weight.grad
        gradient_OI = gradient.T if isinstance(layers[name], Conv1D) else gradient
        torch.testing.assert_close(a_rI.grad, scale * b_Or.T @ gradient_OI, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b_Or.grad, scale * gradient_OI @ a_rI.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_when_there_are_adapters_then_only_they_have_some_and_the_head_has_no_adapter(
    architecture: str,
) -> None:
    model = make_model(ARCHITECTURES[architecture], 1, dtype=torch.float64)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    adapted(model)
    output = with_model(make_student(dtype=torch.float64), model)(
        collate(toy_rows(4)), temperature=1.0, kd_ratio=0.5, normaliser=10.0
    )
    output.loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.partition(".lora_")[0] for name in with_gradient} == linear - {"lm_head"}
    assert all(".lora_" in name for name in with_gradient)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_when_layers_are_recomputed_then_are_the_same(architecture: str) -> None:
    gradients = []
    for recomputes in (False, True):
        model = make_model(ARCHITECTURES[architecture], 1, dtype=torch.float64)
        adapted(model)
        student = with_model(make_student(dtype=torch.float64), model)
        if recomputes:
            recompute_layers(model)
        model.train()
        student(collate(toy_rows(4)), temperature=1.0, kd_ratio=0.5, normaliser=10.0).loss.backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_when_adapters_are_merged_then_is_an_ordinary_one_with_the_same_logits(architecture: str) -> None:
    model = make_model(ARCHITECTURES[architecture], 1, dtype=torch.float64)
    before, names = model(torch.arange(9)[None]).logits, set(model.state_dict())
    adapters = adapted(model)
    with_adapters = model(torch.arange(9)[None]).logits
    adapters.merge()
    merged = model(torch.arange(9)[None]).logits
    assert (with_adapters - before).abs().max() > 0.1
    torch.testing.assert_close(merged, with_adapters, rtol=1e-10, atol=1e-12)
    assert set(model.state_dict()) == names


def test_adapters_when_new_then_change_no_logit_and_follow_their_seed() -> None:
    model = make_model(STUDENT, 1)
    others = [copy.deepcopy(model) for _ in range(3)]
    before = model(torch.arange(9)[None]).logits
    for one, seed in zip(others, (1, 1, 2), strict=True):
        Adapters(one, lora(), seed)
        assert torch.equal(one(torch.arange(9)[None]).logits, before)
    first, same, other = ({name: pair[0] for name, pair in pairs(one).items()} for one in others)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_adapters_when_layers_are_named_then_only_those_have_one() -> None:
    model = make_model(TEACHER, 1)
    Adapters(model, lora(target_modules=("q_proj", "v_proj")), 1)
    assert {name.rpartition(".")[2] for name in pairs(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["no_such_layer", "lm_head", "embed_tokens"])
def test_adapters_when_a_named_layer_is_no_inner_linear_one_then_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"target_modules=\[{name}\] does not fit the model"):
        Adapters(make_model(TEACHER, 1), lora(target_modules=(name,)), 1)


def lora_student() -> StudentWithObjective:
    student = make_student(dropout=0.1)
    model = copy.deepcopy(student.backbone)
    Adapters(model, lora(dropout=0.2), seed=3)
    return with_model(student, model)


def trained(folder: Path, *, stop_after: int | None = None) -> dict[str, str]:
    """Hashes of what a run leaves; one that is to stop is begun, interrupted, and begun again."""

    def track(values: Mapping[str, Any], step: int) -> None:
        if step == stop_after and "loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    def fresh_job() -> TrainingJob:
        rows = toy_rows(8)
        return make_job(folder, student=lora_student(), rows=rows, evaluates=True, keep_best=True, checkpoint_every=2)

    job = fresh_job()
    if stop_after is not None:
        with suppress(Interrupted):
            train(replace(job, track=track))
            raise AssertionError("it was not interrupted")
        job = fresh_job()
    train(job)
    newest = max(path for path in (folder / "checkpoints").iterdir() if path.name[0].isdigit())
    assert load_file(newest / "model.safetensors").keys() == model_tensors(job.student.backbone).keys()
    assert all(".lora_" in name for name in load_file(newest / "model.safetensors"))
    return {path.name: sha256_file(path) for path in (newest / "model.safetensors", folder / "metrics.jsonl")}


@pytest.mark.parametrize("stop_after", [1, 4])
def test_run_when_interrupted_then_its_adapters_and_lines_are_those_of_an_undisturbed_one(
    tmp_path: Path, stop_after: int
) -> None:
    assert trained(tmp_path / "cut", stop_after=stop_after) == trained(tmp_path / "whole")
