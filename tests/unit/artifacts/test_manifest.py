from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pocl_cli.artifacts import Artifact, ArtifactKey, Store, durable
from pocl_cli.artifacts.provenance import git_state, package_versions


def _commit(outputs: Path, **options: object) -> Artifact:
    with Store(outputs).open_work(ArtifactKey("scores", "x", {"a": (1, 2)}, 3)) as work:
        durable.write_bytes(work.path / "rows", b"12345")
        settings: dict[str, object] = {"config": {}, "inputs": {}, "command": [], "seed": 7, **options}
        return work.commit(**settings)  # type: ignore[arg-type]


def test_manifest_when_written_then_holds_everything_that_decided_the_content(outputs: Path) -> None:
    artifact = _commit(
        outputs,
        config={"train": {"lr": 0.1, "stages": (1, 2)}},
        inputs={"partition": "0123456789ab"},
        command=["pocl", "score", "train.lr=0.1"],
        extra={"num_rows": 3},
    )

    text = (artifact.path / "manifest.json").read_text()
    content = json.loads(text)
    seal = content.pop("sha256")
    assert seal == hashlib.sha256(text.replace(f'"{seal}"', "null").encode()).hexdigest()
    times = [datetime.fromisoformat(content.pop(key)) for key in ("started_at", "created_at")]
    assert times[0] <= times[1]
    assert times[1].utcoffset() == timedelta(0)
    packages, git = content.pop("packages"), content.pop("git")
    assert {"python", "torch", "transformers", "datasets", "hydra-core", "omegaconf", "numpy", "pocl-cli"} >= set(
        packages
    )
    assert packages["torch"].startswith("2.")
    assert git is None or len(git["commit"]) == 40
    assert content == {
        "schema_version": 1,
        "kind": "scores",
        "id": artifact.id,
        "slug": "x",
        "version": 3,
        "identity": {"a": [1, 2]},
        "config": {"train": {"lr": 0.1, "stages": [1, 2]}},
        "inputs": {"partition": "0123456789ab"},
        "files": {"rows": {"size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}},
        "extra": {"num_rows": 3},
        "audit": None,
        "command": ["pocl", "score", "train.lr=0.1"],
        "seed": 7,
        "status": "complete",
    }


def test_manifest_when_config_and_command_hold_secrets_then_hides_them_and_nothing_else(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0f1e2d3c4b5a6978")
    config = {
        "tracker": {"api_key": "abc-secret", "password": ["abc-secret"], "name": "wandb"},
        "dataset": {"path": "https://me:abc-secret@host/rows.jsonl", "max_tokens": 512, "max_prompt_tokens": 256},
        "teacher": {"overrides": ["+hub.token=abc-secret", "train.lr=0.1"], "revision": "a" * 40},
        "student": {"tokenizer": "toy", "architecture": {"eos_token": "</s>", "pad_token_id": 0}},
    }
    command = ["pocl", "distill", "+hub.token=abc-secret", "--hf-token", "abc-secret", "x=0f1e2d3c4b5a6978", "lr=0.1"]

    artifact = _commit(outputs, config=config, command=command, extra={"login": {"secret": "abc-secret"}})

    text = (artifact.path / "manifest.json").read_text()
    assert "abc-secret" not in text
    assert "0f1e2d3c4b5a6978" not in text
    kept = artifact.manifest.config
    assert kept["dataset"]["max_tokens"] == 512
    assert kept["dataset"]["max_prompt_tokens"] == 256
    assert kept["teacher"] == {"overrides": ["+hub.token=***", "train.lr=0.1"], "revision": "a" * 40}
    assert kept["student"] == config["student"]
    assert artifact.manifest.command == ["pocl", "distill", "+hub.token=***", "--hf-token", "***", "x=***", "lr=0.1"]


def test_manifest_when_an_argument_is_not_utf8_then_is_written_and_read_back(outputs: Path) -> None:
    artifact = _commit(outputs, command=["pocl", os.fsdecode(b"dataset.path=\xff.jsonl")], config={"p": "\udcff"})

    assert Store(outputs).find((artifact.kind, artifact.id)) == artifact
    assert artifact.manifest.command[1] == "dataset.path=\\udcff.jsonl"


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_state_when_a_tracked_file_changes_then_is_dirty_and_an_untracked_one_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-m", "first")
    (tmp_path / "untracked").write_text("b")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")

    clean = git_state()
    (tmp_path / "file").write_text("b")
    dirty = git_state()

    assert clean is not None
    assert dirty is not None
    assert (clean.dirty, dirty.dirty) == (False, True)
    assert clean.commit == dirty.commit


def test_git_state_when_the_repository_names_a_program_to_run_then_does_not_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-m", "first")
    _git(tmp_path, "config", "core.fsmonitor", f"touch {tmp_path}/ran;")
    monkeypatch.chdir(tmp_path)

    assert git_state() is not None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", ["no repository", "no commit", "no git"])
def test_git_state_when_git_cannot_tell_then_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    if case == "no commit":
        _git(tmp_path, "init")
    elif case == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))

    assert git_state() is None


def test_package_versions_when_asked_then_names_python_and_the_packages_that_decide_results() -> None:
    assert {"python", "torch", "transformers", "numpy"} <= package_versions().keys()
