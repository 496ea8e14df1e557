"""Every truncation and a thousand flipped bits of the artifacts of all four commands: each is detected."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_cli.artifacts import Store
from pocl_cli.artifacts.manifest import load, verify
from pocl_cli.errors import ArtifactError

from ..support.folders import memory_folder
from ..support.tally import trial
from ..support.trials import OUTPUTS, attempt, rerun, results, visible
from .conftest import Reference

NUM_FLIPS = 1000


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    """The outputs of all four commands."""
    with memory_folder() as folder:
        rerun(folder)
        yield folder


def files_of(artifact: Path) -> list[Path]:
    return sorted(path for path in artifact.rglob("*") if path.is_file())


def is_detected(artifact: Path) -> bool:
    try:
        verify(load(artifact))
    except ArtifactError as error:
        return str(artifact) in str(error)
    return False


def test_artifacts_when_any_file_is_truncated_then_it_is_detected_before_it_is_read(finished: Path) -> None:
    num_cut = 0
    for artifact in visible(finished):
        for path in files_of(artifact):
            whole = path.read_bytes()
            for size in sorted({0, 1, len(whole) // 2, len(whole) - 1} & set(range(len(whole)))):
                path.write_bytes(whole[:size])
                with trial("a truncated file: it is detected"), pytest.raises(ArtifactError, match=path.name):
                    load(artifact)
                num_cut += 1
            path.write_bytes(whole)
        assert not is_detected(artifact)
    assert num_cut > 150


def test_artifacts_when_a_thousand_bits_are_flipped_then_every_one_is_detected(finished: Path) -> None:
    draws = random.Random(0)
    artifacts = {
        artifact: [path for path in files_of(artifact) if path.stat().st_size] for artifact in sorted(visible(finished))
    }
    flipped: set[str] = set()
    for number in range(NUM_FLIPS):
        artifact = draws.choice(list(artifacts))
        path = draws.choice(artifacts[artifact])
        place, bit = draws.randrange(path.stat().st_size), draws.randrange(8)
        with path.open("r+b") as handle:
            byte = os.pread(handle.fileno(), 1, place)[0]
            os.pwrite(handle.fileno(), bytes([byte ^ 1 << bit]), place)
            with trial("a flipped bit: it is detected"):
                assert is_detected(artifact), f"flip {number}: bit {bit} of byte {place} of {path}"
            os.pwrite(handle.fileno(), bytes([byte]), place)
        flipped.add(path.name)
    assert {"manifest.json", "model.safetensors", "partition.parquet", "scores.parquet", "metrics.json"} <= flipped
    assert not any(is_detected(artifact) for artifact in artifacts)


@pytest.mark.parametrize(
    ("kind", "name", "needed_by"),
    [
        ("scores", "scores.parquet", "partitions"),
        ("partitions", "partition.parquet", "students"),
        ("students", "model/model.safetensors", "evaluations"),
        ("teacher_signals", "manifest.json", "students"),
    ],
)
def test_command_when_a_bit_of_what_it_needs_is_flipped_then_exits_4_and_goes_on_once_that_is_deleted(
    finished: Path, reference: Reference, tmp_path: Path, kind: str, name: str, needed_by: str
) -> None:
    folder = tmp_path / "trial"
    shutil.copytree(finished / OUTPUTS, folder / OUTPUTS, symlinks=True)
    for after in ("evaluations", needed_by):
        shutil.rmtree(folder / OUTPUTS / after, ignore_errors=True)
    if needed_by == "students":  # the teacher is one too
        for made in (path for path in visible(finished) if path.parent.name == "students" and "teacher" in path.name):
            shutil.copytree(made, folder / OUTPUTS / "students" / made.name)
    if needed_by == "partitions":
        shutil.rmtree(next(path for path in visible(folder) if path.name.startswith("tiny-fkl")))
    newest = Store(folder / OUTPUTS).newest([kind]).path
    damaged = newest / name
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)

    ended = attempt(folder)

    assert ended.code == 4, ended.stderr
    assert str(newest.name) in ended.stderr.splitlines()[-1]
    shutil.rmtree(newest)
    rerun(folder)
    assert results(folder) == reference.results
