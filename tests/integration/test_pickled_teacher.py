"""A teacher whose weights exist as a pickle only: converted once where that is allowed, and never otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocl_cli.errors import ArtifactError, SecurityError
from pocl_cli.run import Run
from pocl_cli.steps.chain import Chain

from ..support.folders import memory_folder
from ..support.recipe import changed, compose, distilled, recipe, write_inputs


@pytest.fixture(scope="module")
def inputs() -> Iterator[Path]:
    """Rows, a teacher, and the same teacher with its weights pickled."""
    with memory_folder() as folder:
        write_inputs(folder)
        shutil.copytree(folder / "teacher", folder / "pickled")
        torch.save(load_file(folder / "pickled" / "model.safetensors"), folder / "pickled" / "pytorch_model.bin")
        (folder / "pickled" / "model.safetensors").unlink()
        yield folder


@pytest.fixture(scope="module")
def run(inputs: Path) -> Run:
    return compose(recipe(inputs, inputs / "out", "train.evaluate_every=0", "train.max_steps=3"))


def with_pickle(run: Run, inputs: Path, outputs: Path, *, allowed: bool = True) -> Run:
    section = run.config.teacher.model_copy(update={"path": str(inputs / "pickled"), "allow_pickle": allowed})
    return changed(run, outputs=outputs, teacher=section)


def test_student_when_its_teacher_is_pickled_and_allowed_then_is_that_of_the_same_weights_and_one_conversion_is_kept(
    run: Run, inputs: Path, tmp_path: Path
) -> None:
    allowed = with_pickle(run, inputs, tmp_path)
    plain, pickled = distilled(changed(run, outputs=tmp_path)), distilled(allowed)
    assert pickled.id != plain.id
    weights = [(student.path / "model" / "model.safetensors").read_bytes() for student in (plain, pickled)]
    assert weights[0] == weights[1]
    (converted,) = (tmp_path / "conversions").glob("pickled-safetensors-*")
    before = {path: path.stat().st_mtime_ns for path in converted.rglob("*")}
    other_seed = allowed.config.train.model_copy(update={"seed": 11})
    distilled(changed(allowed, train=other_seed))
    assert {path: path.stat().st_mtime_ns for path in converted.rglob("*")} == before


def test_conversion_when_it_is_damaged_then_is_refused_and_not_loaded(run: Run, inputs: Path, tmp_path: Path) -> None:
    from pocl_cli.steps.weights import loadable

    chain = Chain(with_pickle(run, inputs, tmp_path))
    assert chain.teacher is not None
    folder = loadable(chain, chain.teacher).weights
    assert isinstance(folder, Path)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="another content"):
        loadable(chain, chain.teacher)


def test_teacher_when_it_is_pickled_and_not_allowed_then_is_refused_with_the_key_to_set(
    run: Run, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(SecurityError, match=r"pickled.*teacher\.allow_pickle=true") as caught:
        distilled(with_pickle(run, inputs, tmp_path, allowed=False))
    assert caught.value.exit_code == 9
    assert not (tmp_path / "conversions").exists()
