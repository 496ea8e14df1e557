"""Checkpoints: what they hold, how many are kept, and what happens to a damaged one."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from pocl_cli.errors import ArtifactError
from pocl_cli.training import checkpoint
from pocl_cli.training.optimizer import make_optimizer
from pocl_cli.training.state import Best, TrainingState

from ...support.training import STUDENT, make_model


class Tied(nn.Module):
    """A tied weight, a frozen one, and two buffers of which one is not part of the model's files."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cached", torch.zeros(2), persistent=False)


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def make_trained(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.01)
    train_a_step(model, optimizer)
    return model, optimizer


def state_at(step: int, best: Best | None = None) -> TrainingState:
    return TrainingState(step=step, stage=1, stage_step=step - 2, num_tokens=10 * step, metrics_bytes=99, best=best)


def save_three(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Checkpoints after steps 3, 4 and 5 of one run; the weights of each."""
    model, optimizer = make_trained(0)
    saved = {}
    for step in (3, 4, 5):
        train_a_step(model, optimizer)
        checkpoint.save(folder, state_at(step), model, optimizer)
        saved[step] = {name: value.clone() for name, value in checkpoint.model_tensors(model).items()}
    return saved


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# ── content ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_checkpoint_when_loaded_then_gives_state_weights_and_buffers(tmp_path):
    model, optimizer = make_trained(0)
    state = state_at(5, Best(4, 12.5, 1.0 / 3, checkpoint.save_best(tmp_path, 4, model)))
    checkpoint.save(tmp_path, state, model, optimizer)
    other, _ = make_trained(1)

    loaded = checkpoint.load_newest(tmp_path, other)

    assert loaded == (state, tmp_path / "00000005-001")
    assert equal(checkpoint.model_tensors(other), checkpoint.model_tensors(model))
    assert other.head.weight is other.embedding.weight


def test_checkpoint_when_weights_are_tied_or_frozen_then_holds_the_tied_once_and_what_may_change():
    names = checkpoint.model_tensors(Tied()).keys()

    assert names == {"embedding.weight", "norm.weight", "norm.bias", "steps"}


def test_optimizer_when_restored_then_goes_on_bit_for_bit(tmp_path):
    model, optimizer = make_trained(0)
    checkpoint.save(tmp_path, state_at(3), model, optimizer)
    resumed, _ = make_trained(1)
    found = checkpoint.load_newest(tmp_path, resumed)
    assert found is not None
    fresh = make_optimizer(resumed, lr=0.1, weight_decay=0.01)

    checkpoint.load_optimizer(found[1], fresh, resumed)
    for pair in ((model, optimizer), (resumed, fresh)):
        train_a_step(*pair)

    assert equal(checkpoint.model_tensors(resumed), checkpoint.model_tensors(model))


def test_optimizer_when_restored_then_all_of_its_state_is_on_the_parameters_device(tmp_path):
    model, optimizer = make_trained(0)
    checkpoint.save(tmp_path, state_at(3), model, optimizer)
    elsewhere = copy.deepcopy(model).to("meta")
    fresh = make_optimizer(elsewhere, lr=0.1, weight_decay=0.01)

    checkpoint.load_optimizer(tmp_path / "00000003-001", fresh, elsewhere)

    # The fused AdamW of a GPU wants its step count there too.
    assert {value.device.type for slots in fresh.state.values() for value in slots.values()} == {"meta"}
    assert len(fresh.state) == 3


def test_checkpoint_between_stages_when_saved_then_holds_no_optimizer(tmp_path):
    model, _ = make_trained(0)

    checkpoint.save(tmp_path, TrainingState(step=3, stage=2), model, None)

    names = {path.name for path in (tmp_path / "00000003-002").iterdir()}
    assert names == {"model.safetensors", "state.json"}


def test_load_when_there_is_no_checkpoint_then_gives_none_and_leaves_the_model(tmp_path):
    model, _ = make_trained(0)
    before = {name: value.clone() for name, value in checkpoint.model_tensors(model).items()}

    assert checkpoint.load_newest(tmp_path / "missing", model) is None
    assert checkpoint.load_newest(tmp_path, model) is None
    assert equal(checkpoint.model_tensors(model), before)


def test_load_when_the_models_tensors_have_other_names_then_stops_and_changes_nothing():
    model, other = make_model(STUDENT, 0), make_model({**STUDENT, "n_layer": 2}, 1)
    tensors = checkpoint.model_tensors(other)

    with pytest.raises(AssertionError, match="tensors differ"):
        checkpoint.load_model_tensors(model, tensors)

    assert equal(checkpoint.model_tensors(model), checkpoint.model_tensors(make_model(STUDENT, 0)))


# ── how many ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_checkpoints_when_a_third_is_saved_then_the_two_newest_stay(tmp_path):
    save_three(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004-001", "00000005-001"]


def test_checkpoint_when_one_of_that_name_is_there_then_replaces_it(tmp_path):
    saved = save_three(tmp_path)
    model, optimizer = make_trained(9)

    checkpoint.save(tmp_path, state_at(5), model, optimizer)

    other, _ = make_trained(1)
    checkpoint.load_newest(tmp_path, other)
    assert equal(checkpoint.model_tensors(other), checkpoint.model_tensors(model))
    assert not equal(checkpoint.model_tensors(other), saved[5])


def test_checkpoint_when_a_killed_save_left_a_part_then_removes_it_and_does_not_read_it(tmp_path):
    saved = save_three(tmp_path)
    shutil.copytree(tmp_path / "00000005-001", tmp_path / ".partial-00000007-001")
    model, optimizer = make_trained(0)

    found = checkpoint.load_newest(tmp_path, model)
    checkpoint.save(tmp_path, state_at(6), model, optimizer)

    assert found is not None
    assert found[0].step == 5
    assert equal(checkpoint.model_tensors(model), saved[5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000005-001", "00000006-001"]


def test_best_states_when_checkpoints_are_pruned_then_those_that_a_kept_one_names_stay(tmp_path):
    model, optimizer = make_trained(0)

    for step in (3, 4, 5):
        best = Best(step, 1.0, 1.0, checkpoint.save_best(tmp_path, step, model))
        checkpoint.save(tmp_path, state_at(step, best), model, optimizer)

    assert sorted(path.name for path in tmp_path.glob("best-*")) == [
        "best-00000004.safetensors",
        "best-00000005.safetensors",
    ]


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def damage_by_flip(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_removal(path: Path) -> None:
    path.unlink()


def damage_by_another_kind(path: Path) -> None:
    path.write_bytes(b"[1]")


DAMAGES = [damage_by_flip, damage_by_truncation, damage_by_emptying, damage_by_removal, damage_by_another_kind]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_load_when_the_newest_is_damaged_then_takes_the_one_before_and_names_it(tmp_path, caplog, name, damage):
    saved = save_three(tmp_path)
    damage(tmp_path / "00000005-001" / name)
    model, _ = make_trained(1)

    with caplog.at_level(logging.WARNING, "pocl"):
        found = checkpoint.load_newest(tmp_path, model)

    assert found is not None
    assert found == (state_at(4), tmp_path / "00000004-001")
    assert equal(checkpoint.model_tensors(model), saved[4])
    assert ["00000005-001" in record.message for record in caplog.records] == [True]


def test_load_when_any_byte_of_the_state_is_flipped_then_no_other_state_is_taken_for_it(tmp_path):
    save_three(tmp_path)
    path = tmp_path / "00000005-001" / "state.json"
    whole = path.read_bytes()
    model, _ = make_trained(1)

    for position in range(0, len(whole), 3):
        flip(path, position)
        found = checkpoint.load_newest(tmp_path, model)
        path.write_bytes(whole)
        assert found is not None
        assert found[0] in (state_at(4), state_at(5)), whole[position : position + 20]


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_when_the_best_state_that_the_newest_names_is_damaged_then_takes_the_one_before(tmp_path, damage):
    model, optimizer = make_trained(0)
    for step in (4, 5):
        best = Best(step, 1.0, 1.0, checkpoint.save_best(tmp_path, step, model))
        checkpoint.save(tmp_path, state_at(step, best), model, optimizer)
        train_a_step(model, optimizer)
    damage(tmp_path / "best-00000005.safetensors")

    found = checkpoint.load_newest(tmp_path, model)

    assert found is not None
    assert found[0].step == 4


def test_load_when_every_checkpoint_is_damaged_then_stops_with_exit_code_4_and_the_command_to_start_afresh(tmp_path):
    folder = tmp_path / "a run" / "checkpoints"
    save_three(folder)
    for path in folder.glob("*/model.safetensors"):
        flip(path, 200)
    model, _ = make_trained(1)

    with pytest.raises(ArtifactError, match="every checkpoint is damaged") as caught:
        checkpoint.load_newest(folder, model)

    assert caught.value.exit_code == 4
    assert f"rm -r '{tmp_path / 'a run'}'" in str(caught.value)


def test_best_state_when_it_is_damaged_then_is_not_restored(tmp_path):
    model, _ = make_trained(0)
    best = Best(3, 1.0, 1.0, checkpoint.save_best(tmp_path, 3, model))
    flip(tmp_path / "best-00000003.safetensors", 300)
    other, _ = make_trained(1)
    before = {name: value.clone() for name, value in checkpoint.model_tensors(other).items()}

    with pytest.raises(ArtifactError, match="best state is damaged"):
        checkpoint.load_best(tmp_path, best, other)

    assert equal(checkpoint.model_tensors(other), before)


# ── other conditions ──────────────────────────────────────────────────────────────────────────────────────────────


def test_load_when_the_run_was_begun_under_other_conditions_then_stops_and_says_which(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "2.0.0")
        torch.set_num_threads(2)
        save_three(tmp_path)
        torch.set_num_threads(1)
    model, _ = make_trained(1)

    with pytest.raises(ArtifactError, match="other conditions") as caught:
        checkpoint.load_newest(tmp_path, model)

    assert caught.value.exit_code == 4
    assert f'torch: "2.0.0" → "{torch.__version__}"' in str(caught.value)
    assert "num_threads: 2 → 1" in str(caught.value)


# ── the teacher's source ──────────────────────────────────────────────────────────────────────────────────────────


def test_teacher_when_no_checkpoint_was_made_yet_then_its_source_may_change(tmp_path):
    checkpoint.refuse_other_teacher(tmp_path, "online")
    checkpoint.refuse_other_teacher(tmp_path, "stored")

    save_three(tmp_path)
    checkpoint.refuse_other_teacher(tmp_path, "stored")


@pytest.mark.parametrize("noted", ["online", None, "nothing", "damage"])
def test_teacher_when_the_checkpoints_are_from_another_source_then_is_refused(tmp_path, noted):
    if noted != "nothing":
        checkpoint.refuse_other_teacher(tmp_path, noted)
    if noted == "damage":
        (tmp_path / "teacher.json").write_text("[1")
    save_three(tmp_path)

    for _ in range(2):  # refusing does not note the new source
        with pytest.raises(ArtifactError, match=r'teacher: .* → "stored"'):
            checkpoint.refuse_other_teacher(tmp_path, "stored")
