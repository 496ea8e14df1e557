from __future__ import annotations

from pathlib import Path

import pytest

from pocl_cli.errors import ConfigError
from pocl_cli.registry import trackers

wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
pytestmark = pytest.mark.slow


def test_wandb_when_offline_then_the_run_is_kept_in_its_folder_and_holds_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = trackers.build({"name": "wandb", "project": "pocl", "entity": None, "mode": "offline"})
    with tracker.open(tmp_path / "new" / "run-1", "gpt2-fkl", {"train": {"seed": 10}, "hub_token": "hunter2"}) as run:
        run.log({"step": 1, "loss": 0.5}, 1)
    # W&B's own process writes the file out when the program ends.
    wandb.teardown()
    (path,) = tmp_path.glob("new/run-1/wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert b"loss" in content
    assert b"seed" in content
    assert b"hunter2" not in content
    assert capsys.readouterr().out == ""


def test_wandb_when_online_without_a_key_then_the_error_says_how_to_log_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = trackers.build({"name": "wandb", "project": "pocl", "entity": None, "mode": "online"})
    with pytest.raises(ConfigError, match="wandb login"):
        tracker.open(tmp_path, "run", {})
