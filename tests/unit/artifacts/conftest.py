"""A small artifact, made the way that every step makes one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocl_cli.artifacts import Artifact, ArtifactKey, Store, durable

Make = Callable[..., Artifact]


def make_student(outputs: Path, seed: int = 1, *, slug: str = "tiny") -> Artifact:
    """Finds or makes the student artifact of a seed: a model folder, a metrics file, and a checkpoint not shipped."""
    store = Store(outputs)
    key = ArtifactKey("students", slug, {"train": {"seed": seed, "lr": 0.001}}, version=1)
    found = store.find(key)
    if found is not None:
        return found
    with store.open_work(key, summary={"seed": seed}) as work:
        if work.finished is not None:
            return work.finished
        durable.write_json(work.path / "model" / "config.json", {"model_type": "llama", "seed": seed})
        durable.write_bytes(work.path / "model" / "model.safetensors", bytes(range(200)))
        durable.append_jsonl(work.path / "metrics.jsonl", [{"step": 1, "loss": 2.5}])
        durable.write_text(work.path / "checkpoints" / "step-1" / "state.json", "{}")
        return work.commit(
            config={"train": {"seed": seed}},
            inputs={"partition": "0123456789ab"},
            command=["pocl", "distill"],
            seed=seed,
            exclude=["checkpoints"],
        )


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def make() -> Make:
    return make_student


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root and mount(8)")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
