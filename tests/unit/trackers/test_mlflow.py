from __future__ import annotations

from pathlib import Path

import pytest

from pocl_cli.errors import ResourceError
from pocl_cli.registry import trackers

mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
pytestmark = pytest.mark.slow

CONFIG = {"train": {"seed": 10, "lr": 5e-4}, "hub_token": "hunter2", "note": "x" * 2000}


def test_mlflow_when_a_failed_run_goes_on_then_it_stays_one_run_with_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = trackers.build({"name": "mlflow", "tracking_uri": None, "experiment": "pocl"})
    with pytest.raises(KeyError), tracker.open(tmp_path / "new" / "run-1", "gpt2-fkl", CONFIG) as run:
        run.log({"step": 1, "loss": 3.0}, 1)
        run.log({"step": 2, "loss": 2.0}, 2)
        raise KeyError("killed")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'new' / 'run-1' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pocl").experiment_id
    assert [known.info.status for known in client.search_runs([experiment])] == ["FAILED"]

    with tracker.open(tmp_path / "new" / "run-1", "gpt2-fkl", CONFIG) as run:
        run.log({"step": 2, "loss": 2.0}, 2)
        run.log({"step": 2, "dev_rouge_l": 20.0}, 2)
        run.log({"step": 3, "loss": 1.0}, 3)
    (known,) = client.search_runs([experiment])
    assert (known.info.status, known.info.run_name) == ("FINISHED", "gpt2-fkl")
    assert known.data.params["train.seed"] == "10"
    assert known.data.params["hub_token"] == "***"
    history = client.get_metric_history(known.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert known.data.metrics["dev_rouge_l"] == 20.0
    assert capsys.readouterr().out == ""


def test_mlflow_when_no_server_answers_then_a_resource_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://user:hunter2@127.0.0.1:9"
    tracker = trackers.build({"name": "mlflow", "tracking_uri": uri, "experiment": "pocl"})
    with pytest.raises(ResourceError) as caught:
        tracker.open(tmp_path, "run", {})
    assert "127.0.0.1:9" in str(caught.value)
    assert "hunter2" not in str(caught.value)
