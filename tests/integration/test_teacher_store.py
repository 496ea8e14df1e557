"""The teacher's stored hidden states in whole commands: who makes them, who reads them, and what refuses them."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaModel

from pocl_cli.artifacts.hashing import sha256_file
from pocl_cli.errors import ArtifactError
from pocl_cli.run import Run
from pocl_cli.steps import score
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.teacher import stored_sizes

from ..support.command import Finished, run_pocl
from ..support.folders import memory_folder
from ..support.recipe import compose, distilled, recipe, write_inputs
from ..support.training import make_model, toy_tokenizer, train_lines

FAST = ("train.max_steps=6", "train.evaluate_every=0", "score.max_new_tokens=2")


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    with memory_folder() as folder:
        write_inputs(folder)
        yield folder


def run_in(inputs: Path, outputs: Path, *changes: str, step: str = "distill") -> Run:
    return compose(recipe(inputs, outputs, *FAST, *changes), step)


@contextmanager
def teacher_tokens() -> Iterator[list[int]]:
    """How many tokens each forward pass of a Llama runs on: the teacher is one, the student a GPT-2."""
    passes: list[int] = []

    def count(module: nn.Module, args: object, output: Any) -> None:
        if isinstance(module, LlamaModel):
            passes.append(output.last_hidden_state.shape[:2].numel())

    handle = register_module_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def store_hashes(outputs: Path) -> dict[str, str]:
    """The sha256 of all that the store holds, manifests apart."""
    found = sorted((outputs / "teacher_signals").glob("*-*/*"))
    return {f"{path.parent.name}/{path.name}": sha256_file(path) for path in found if path.name != "manifest.json"}


def numbers(folder: Path) -> list[float]:
    return [line[key] for line in train_lines(folder) for key in ("loss", "grad_norm")]


# ── made once ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sweep_when_the_first_job_has_run_then_the_teacher_is_not_even_loaded_for_the_second(
    tmp_path: Path, inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with teacher_tokens() as first:
        distilled(run_in(inputs, tmp_path, "kd_method=fkl"))
    made = store_hashes(tmp_path)

    caplog.clear()
    with teacher_tokens() as second, caplog.at_level(logging.INFO, logger="pocl"):
        artifact = distilled(run_in(inputs, tmp_path, "kd_method=rkl", "train.seed=3", "curriculum.temperature.end=3"))

    assert len(first) > 0
    assert second == []
    assert store_hashes(tmp_path) == made
    consumed = train_lines(artifact.path)[-1]["num_tokens"]
    (line,) = [record.getMessage() for record in caplog.records if "teacher tokens saved" in record.getMessage()]
    assert f"({consumed} of {consumed} response tokens)" in line


def test_score_when_it_measures_the_teacher_then_its_pass_makes_the_bytes_that_training_makes(
    tmp_path: Path, inputs: Path
) -> None:
    with teacher_tokens() as scored:
        score.run(run_in(inputs, tmp_path / "scored", step="score"))
    with teacher_tokens() as distilled_after:
        after = distilled(run_in(inputs, tmp_path / "scored"))
    lazily = distilled(run_in(inputs, tmp_path / "lazily", "hardware.max_tokens_per_micro_batch=64"))

    assert len(scored) > 0
    assert distilled_after == []
    assert store_hashes(tmp_path / "scored") == store_hashes(tmp_path / "lazily")
    assert numbers(after.path) == pytest.approx(numbers(lazily.path), rel=1e-4)


def test_score_when_the_teacher_is_stored_or_not_then_its_scores_are_the_same_bytes(
    tmp_path: Path, inputs: Path
) -> None:
    files = {}
    for name, changes in {
        "stored": (),
        "online": ("teacher.store=false",),
        "unread": ("kd_method=sft",),
    }.items():
        run = run_in(inputs, tmp_path / name, *changes, step="score")
        score.run(run)
        found = Chain(run).store.find(Chain(run).score_key("teacher"))
        assert found is not None
        files[name] = sha256_file(found.path / "scores.parquet")
    distilled(run_in(inputs, tmp_path / "read"))
    with teacher_tokens() as passes:
        score.run(run_in(inputs, tmp_path / "read", step="score"))
    chain = Chain(run_in(inputs, tmp_path / "read"))
    found = chain.store.find(chain.score_key("teacher"))
    assert found is not None
    files["read"] = sha256_file(found.path / "scores.parquet")

    assert len(set(files.values())) == 1, files
    assert passes == []
    assert store_hashes(tmp_path / "stored")
    assert store_hashes(tmp_path / "online") == store_hashes(tmp_path / "unread") == {}


def test_distill_when_the_teacher_is_stored_or_online_then_the_student_has_one_id_and_the_same_numbers(
    tmp_path: Path, inputs: Path
) -> None:
    changes = ("student.dropout=0", "train.max_steps=null")
    stored = distilled(run_in(inputs, tmp_path / "stored", *changes))
    online = distilled(run_in(inputs, tmp_path / "online", *changes, "teacher.store=false"))

    assert stored.id == online.id
    assert numbers(stored.path) == pytest.approx(numbers(online.path), rel=1e-4, abs=1e-5)
    assert len(numbers(stored.path)) == 2 * 24
    assert store_hashes(tmp_path / "online") == {}


# ── which store ───────────────────────────────────────────────────────────────────────────────────────────────────────


def shards(chain: Chain) -> set[str]:
    return {path.name for path in (chain.store.outputs / "teacher_signals").glob("*-shard-*")}


def test_store_when_weights_tokenizer_dtype_precision_or_a_row_change_then_is_another(tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    write_inputs(inputs)

    def made_by(*changes: str) -> set[str]:
        run = run_in(inputs, outputs, "train.max_steps=1", *changes)
        before = shards(Chain(run))
        distilled(run)
        return shards(Chain(run)) - before

    counts = {"first": len(made_by()), "seed": len(made_by("train.seed=5"))}
    counts["dtype"] = len(made_by("teacher.dtype=bfloat16"))
    counts["precision"] = len(made_by("hardware.precision=bfloat16"))
    weights = load_file(inputs / "teacher" / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, inputs / "teacher" / "model.safetensors", {"format": "pt"})
    counts["weights"] = len(made_by())
    settings = json.loads((inputs / "teacher" / "tokenizer_config.json").read_text())
    (inputs / "teacher" / "tokenizer_config.json").write_text(json.dumps({**settings, "comment": "another"}))
    counts["tokenizer"] = len(made_by())
    rows = (inputs / "rows.jsonl").read_text().replace("red cat", "red red cat", 1)
    (inputs / "rows.jsonl").write_text(rows)
    counts["row"] = len(made_by())

    assert counts == {"first": 1, "seed": 0, "dtype": 1, "precision": 1, "weights": 1, "tokenizer": 1, "row": 1}


# ── refused ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def error_of(done: Finished, code: int) -> str:
    assert done.exit_code == code, done.stderr
    (line,) = done.errors
    return line


def test_command_when_a_shard_is_damaged_then_exits_4_names_the_file_and_goes_on_when_it_is_deleted(
    tmp_path: Path, inputs: Path
) -> None:
    words = recipe(inputs, tmp_path, *FAST)
    distilled(compose(words))
    (path,) = (tmp_path / "teacher_signals").glob("*-shard-*/hidden.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    line = error_of(run_pocl("distill", *words, "kd_method=rkl", cwd=tmp_path), 4)

    assert str(path) in line
    assert f"rm -r {path.parent}" in line
    shutil.rmtree(path.parent)
    assert run_pocl("distill", *words, "kd_method=rkl", cwd=tmp_path).exit_code == 0


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("step", ["score", "distill"])
def test_command_when_the_hidden_states_do_not_fit_on_the_disk_then_exits_5_before_it_starts(
    tmp_path: Path, step: str
) -> None:
    write_inputs(tmp_path)
    sizes = {"model_type": "opt", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8}
    shutil.rmtree(tmp_path / "teacher")
    wide = make_model({**sizes, "word_embed_proj_dim": 16384, "max_position_embeddings": 64}, 2, dropout=None)
    wide.save_pretrained(tmp_path / "teacher")
    toy_tokenizer().save_pretrained(tmp_path / "teacher")
    words = recipe(tmp_path, tmp_path / "outputs", *FAST)

    with small_disk(tmp_path / "outputs", "3m"):
        line = error_of(run_pocl(step, *words, cwd=tmp_path), 5)
        assert not (tmp_path / "outputs" / "teacher_signals").exists()

    assert "MiB are needed" in line
    assert "teacher.store=false" in line
    assert "paths.outputs" in line


@pytest.mark.parametrize(("before", "after"), [("true", "false"), ("false", "true")])
def test_run_when_it_resumes_with_the_teachers_other_source_then_exits_4(
    tmp_path: Path, inputs: Path, before: str, after: str
) -> None:
    words = [*recipe(inputs, tmp_path), "train.checkpoint_every=1", "curriculum.epochs_per_stage=20"]
    done = run_pocl(
        "distill", *words, f"teacher.store={before}", cwd=tmp_path, interrupt_at=lambda said: "stage 1:" in said
    )
    assert done.exit_code == 130, done.stderr

    line = error_of(run_pocl("distill", *words, f"teacher.store={after}", cwd=tmp_path), 4)

    assert "begun under other conditions" in line
    assert 'teacher: "online" → "stored"' in line or 'teacher: "stored" → "online"' in line
    assert "teacher.store" in line


def test_store_when_the_command_is_interrupted_while_it_fills_then_a_rerun_completes_it(
    tmp_path: Path, inputs: Path
) -> None:
    words = recipe(inputs, tmp_path / "outputs", *FAST)
    done = run_pocl("distill", *words, cwd=tmp_path, interrupt_at=lambda said: "shards are stored" in said)
    assert done.exit_code == 130, done.stderr

    again = run_pocl("distill", *words, cwd=tmp_path)
    assert again.exit_code == 0, again.stderr

    undisturbed = run_pocl("distill", *recipe(inputs, tmp_path / "other", *FAST), cwd=tmp_path)
    assert undisturbed.exit_code == 0, undisturbed.stderr
    assert store_hashes(tmp_path / "outputs") == store_hashes(tmp_path / "other")
    assert list((tmp_path / "outputs" / ".work").iterdir()) == []


def test_distill_when_the_teachers_head_cannot_be_stored_then_runs_online_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_inputs(tmp_path)
    # BERT transforms the hidden state before its output matrix.
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shutil.rmtree(tmp_path / "teacher")
    bert = make_model({"model_type": "bert", "is_decoder": True, **sizes}, 2, dropout=None)
    bert.save_pretrained(tmp_path / "teacher")
    toy_tokenizer().save_pretrained(tmp_path / "teacher")

    distilled(run_in(tmp_path, tmp_path / "outputs"))

    assert "cannot be stored" in caplog.text
    assert store_hashes(tmp_path / "outputs") == {}


# ── plans, and teachers that are made here ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("store", "shown"), [("true", True), ("false", False)])
def test_plan_when_the_teacher_is_stored_then_shows_what_that_takes(
    tmp_path: Path, inputs: Path, store: str, shown: bool
) -> None:
    words = [*recipe(inputs, tmp_path / "outputs"), "plan=true", f"teacher.store={store}"]
    done = run_pocl("distill", *words, cwd=tmp_path)

    assert done.exit_code == 0, done.stderr
    assert ("teacher's hidden states" in done.stderr) == shown
    assert not (tmp_path / "outputs").exists()


def test_distill_when_the_teacher_was_made_here_and_is_stored_then_its_weights_are_not_read(
    tmp_path: Path, inputs: Path
) -> None:
    outputs = tmp_path / "outputs"
    teacher = distilled(run_in(inputs, outputs, "kd_method=sft", "curriculum=none", "student.name=made"))
    changes = ("teacher.name=made", f"teacher.path={teacher.id}", "train.seed=4")
    distilled(run_in(inputs, outputs, *changes))
    weights = teacher.path / "model" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))

    distilled(run_in(inputs, outputs, *changes, "kd_method=rkl"))

    shutil.rmtree(outputs / "teacher_signals")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        distilled(run_in(inputs, outputs, *changes, "kd_method=jsd"))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_store_when_it_is_made_then_has_the_backbones_dtype_and_the_size_that_was_estimated(
    tmp_path: Path, inputs: Path, dtype: str
) -> None:
    run = run_in(inputs, tmp_path, f"teacher.dtype={dtype}")
    distilled(run)

    (path,) = (tmp_path / "teacher_signals").glob("*-shard-*/hidden.safetensors")
    (head_path,) = (tmp_path / "teacher_signals").glob("*-head-*/head.safetensors")
    hidden, head = load_file(path)["hidden"], load_file(head_path)["weight"]
    assert hidden.dtype == head.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    chain = Chain(run)
    assert chain.teacher is not None
    assert stored_sizes(chain.teacher) == (hidden[0].nbytes, head.nbytes)
    rows = pq.read_table(path.parent / "rows.parquet").to_pylist()
    assert sum(row["num_tokens"] for row in rows) == len(hidden)
    assert len(rows) == 24
