"""What stops a step before it loads a model, and what numbers that are not finite do: they stop it and are not kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocl_cli.errors import ConfigError, NonFiniteError, PoclError, ResourceError, SecurityError
from pocl_cli.models.device import Hardware
from pocl_cli.models.load import load_tokenizer
from pocl_cli.run import Run
from pocl_cli.steps import distill, evaluate, score
from pocl_cli.steps.chain import Chain
from pocl_cli.steps.checks import of_plan, verdicts
from pocl_cli.steps.costs import Sizes, training_memory

from ..support.command import run_pocl
from ..support.folders import memory_folder, mounted
from ..support.recipe import changed, compose, recipe, write_inputs

SHORT = {"max_tokens": 64, "max_prompt_tokens": 32}
STEPS: dict[str, Callable[[Run], object]] = {"score": score.run, "distill": distill.run, "evaluate": evaluate.run}


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    with memory_folder() as folder:
        write_inputs(folder)
        yield folder


@pytest.fixture(scope="module")
def base(inputs: Path) -> Run:
    return compose(recipe(inputs, inputs / "out", "train.evaluate_every=0", "train.max_steps=2", "curriculum=none"))


@pytest.fixture
def bad(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the teacher to spoil, whose weights cannot be read: what refuses it has not tried to."""
    folder = tmp_path / "bad"
    shutil.copytree(inputs / "teacher", folder)
    (folder / "model.safetensors").write_bytes(b"junk")
    return folder


def with_model(base: Run, step: str, model: Path, outputs: Path, **dataset: Any) -> Run:
    """The run of a step that reads `model`: evaluate as the evaluated one, the others as the teacher."""
    evaluation = base.config.evaluation.model_copy(update={"model": str(model)})
    if dataset:
        evaluation = evaluation.model_copy(
            update={"datasets": tuple(one.model_copy(update=dataset) for one in evaluation.datasets)}
        )
    return changed(
        base.for_step(step),
        outputs=outputs,
        teacher=base.config.teacher.model_copy(update={"path": str(model), "store": False}),
        evaluation=evaluation,
        dataset=base.config.dataset.model_copy(update=dataset),
    )


def change_json(path: Path, **values: Any) -> None:
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def other_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = [token for token, number in vocabulary.items() if number in (100, 101)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


EARLY: dict[str, tuple[Callable[[Path], object], type[PoclError], str]] = {
    "no EOS": (lambda f: change_json(f / "tokenizer_config.json", eos_token=None), ConfigError, "has no EOS token"),
    "short context": (
        lambda f: change_json(f / "config.json", max_position_embeddings=32), ConfigError, "64 tokens do not fit"
    ),
    "too few rows": (lambda f: change_json(f / "config.json", vocab_size=300), ConfigError, "does not fit its model"),
    "too large": (
        lambda f: change_json(f / "config.json", hidden_size=2**17, intermediate_size=2**19),
        ResourceError,
        "not enough memory on cpu",
    ),
    "another tokenizer": (other_tokenizer, ConfigError, "different tokenizers: token id 100"),
}  # fmt: skip


# Where one model is evaluated there is no other tokenizer.
EARLY_IN_STEPS = [
    (step, fault) for step in STEPS for fault in EARLY if (step, fault) != ("evaluate", "another tokenizer")
]


@pytest.mark.parametrize(("step", "fault"), EARLY_IN_STEPS)
def test_step_when_a_model_cannot_serve_it_then_says_so_before_weights_are_read(
    base: Run, bad: Path, tmp_path: Path, step: str, fault: str
) -> None:
    spoil, error, message = EARLY[fault]
    spoil(bad)
    run = with_model(base, step, bad, tmp_path / "out", **SHORT)
    with pytest.raises(error, match=message):
        STEPS[step](run)
    assert list((tmp_path / "out").glob("*/*-*")) == []


def test_distill_when_the_disk_cannot_hold_a_checkpoint_then_says_so_before_weights_are_read(
    base: Run, bad: Path, tmp_path: Path
) -> None:
    refused = pytest.raises(ResourceError, match="not enough disk space for a checkpoint and the student")
    with mounted(tmp_path / "disk", "-o", "size=128k") as place, refused:
        distill.run(with_model(base, "distill", bad, place))


@pytest.mark.parametrize("fault", EARLY)
def test_plan_when_a_check_fails_then_would_refuse_and_the_others_are_shown_too(
    base: Run, bad: Path, tmp_path: Path, fault: str
) -> None:
    spoil, _, message = EARLY[fault]
    spoil(bad)
    rows = verdicts(of_plan(Chain(with_model(base, "distill", bad, tmp_path / "out"))))
    refused = [finding for _, verdict, finding in rows if verdict == "would refuse"]
    assert any(message in finding for finding in refused)
    assert {"student: context", "teacher: vocabulary", "memory", "disk", "evaluate rows: context"} <= {
        name for name, _, _ in rows
    }
    assert [verdict for name, verdict, _ in rows if name.startswith("student")] == ["ok"] * 3
    assert not (tmp_path / "out").exists()


def test_plan_when_everything_would_be_refused_then_ends_well_and_writes_nothing(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "teacher", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    words = recipe(inputs, tmp_path / "out", "teacher.path=pickled", "dataset.max_tokens=200", "plan=true")
    done = run_pocl("distill", *words, cwd=tmp_path)
    assert (done.exit_code, done.stdout, done.errors) == (0, "", [])
    assert done.stderr.count("would refuse") >= 2
    assert done.stderr.count("teacher.allow_pickle=true") <= 2, "in the table once, and beside the estimates"
    assert "not known" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pickled"]


def test_checks_when_the_whole_disk_is_not_enough_for_all_checkpoints_then_only_warn(
    base: Run, bad: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "-o", "size=400k") as place:
        rows = verdicts(of_plan(Chain(with_model(base, "distill", bad, place))))
    assert [verdict for name, verdict, _ in rows if name == "disk"] == ["warning"]


def test_checks_when_nothing_is_wrong_then_all_pass(base: Run, inputs: Path, tmp_path: Path) -> None:
    run = with_model(base, "distill", inputs / "teacher", tmp_path, **SHORT)
    assert {verdict for _, verdict, _ in verdicts(of_plan(Chain(run)))} == {"ok"}


def test_checks_when_weights_are_pickled_then_name_the_key_that_allows_them(
    base: Run, bad: Path, tmp_path: Path
) -> None:
    (bad / "model.safetensors").rename(bad / "pytorch_model.bin")
    with pytest.raises(SecurityError, match=r"teacher\.allow_pickle=true"):
        distill.run(with_model(base, "distill", bad, tmp_path))


# ── padding ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_student_when_its_tokenizer_has_no_pad_token_then_scores_the_rows_as_with_one(
    base: Run, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "teacher", tmp_path / "unpadded")
    change_json(tmp_path / "unpadded" / "tokenizer_config.json", pad_token=None)
    lines = []
    for model in (inputs / "teacher", tmp_path / "unpadded"):
        run = with_model(base, "evaluate", model, tmp_path / model.name, **SHORT)
        lines.append((evaluate.run(run).artifact.path / "predictions.jsonl").read_text())
    source = Chain(run).evaluated[0]
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert lines[0] == lines[1]


# ── numbers that are not finite ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def poisoned(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the teacher with one weight that is no number."""
    folder = tmp_path / "poisoned"
    shutil.copytree(inputs / "teacher", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("store", [False, True])
def test_step_when_a_model_gives_no_finite_numbers_then_stops_and_names_them_and_keeps_nothing(
    base: Run, poisoned: Path, tmp_path: Path, step: str, store: bool
) -> None:
    run = with_model(base, step, poisoned, tmp_path / "out", **SHORT)
    run = changed(run, teacher=run.config.teacher.model_copy(update={"store": store}))
    with pytest.raises(NonFiniteError, match=r"finite|nan") as caught:
        STEPS[step](run)
    assert caught.value.exit_code == 7
    assert "record" in str(caught.value) or "prompt" in str(caught.value)
    kept = [path for path in (tmp_path / "out").glob("*/*-*") if path.parent.name != "teacher_signals"]
    assert kept == []


def test_student_that_gives_no_finite_numbers_when_it_is_scored_then_is_refused(
    base: Run, poisoned: Path, tmp_path: Path
) -> None:
    student = base.config.student.model_copy(update={"path": str(poisoned), "architecture": None, "tokenizer": None})
    run = changed(base.for_step("score"), outputs=tmp_path / "out", student=student)
    run = changed(run, score=run.config.score.model_copy(update={"teacher": False}))
    with pytest.raises(NonFiniteError):
        score.run(run)
    assert list((tmp_path / "out").glob("*/*-*")) == []


def test_memory_when_the_models_are_cut_into_parts_then_a_process_needs_less_and_never_less_than_all_weights() -> None:
    student, teacher = Sizes(1000, 1000, 100, 8, 4), Sizes(4000, 4000, 400, 8, 4)
    hardware = Hardware(torch.device("cpu"), "float32", 4096, 256)
    whole, cut = (training_memory(student, teacher, hardware, num_parts) for num_parts in (1, 4))
    assert whole.least == 1000 * 16 + 4000 * 4
    assert cut.least == 1000 * (4 + 1 + 2) + 4000 * 4 // 4
    assert whole.estimate - cut.estimate == 3 / 4 * (1000 * 8 + 4000 * 4)
    assert all(one.least < one.estimate for one in (whole, cut))
