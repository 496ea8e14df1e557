"""MLflow tracking."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pocl_cli.errors import ResourceError
from pocl_cli.redaction import scrub, scrub_values
from pocl_cli.registry import trackers
from pocl_cli.trackers import TrackerRun, numbers, require_package

_RUN_TAG = "pocl.run"
_LONGEST_PARAMETER = 500
_PARAMETERS_PER_CALL = 100


@trackers.register("mlflow")
@dataclass(frozen=True, kw_only=True)
class MLflow:
    """A run of MLflow, at `tracking_uri`, else at MLFLOW_TRACKING_URI, else in a database in the run's folder."""

    tracking_uri: str | None
    experiment: Annotated[str, Field(min_length=1)]

    def check(self) -> None:
        require_package("mlflow", extra="mlflow")

    def open(self, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> TrackerRun:
        self.check()
        # Nobody who asks for a local database expects reports to MLflow's makers; who wants them can say so.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow's own seven retries make a server that is not there known after four minutes only.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        from mlflow import MlflowClient

        from pocl_cli.artifacts import durable

        folder = run_folder.resolve()
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            durable.make_folder(folder)
        with _reported(uri):
            client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is not None:
                experiment_id = experiment.experiment_id
            else:
                location = None if uri else (folder / "mlflow").as_uri()
                experiment_id = client.create_experiment(self.experiment, artifact_location=location)
            known = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{run_folder.name}'", max_results=1)
            if known:
                run_id = known[0].info.run_id
                client.update_run(run_id, status="RUNNING")
            else:
                tags = {_RUN_TAG: run_folder.name}
                run_id = client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
                _log_parameters(client, run_id, config)
            recorded = _last_steps(client, run_id, known[0].data.metrics if known else ())
        return _MLflowRun(client, run_id, recorded, uri)


class _MLflowRun(TrackerRun):
    def __init__(self, client: Any, run_id: str, recorded: Mapping[str, int], uri: str | None) -> None:
        self._client, self._run_id, self._recorded, self._uri = client, run_id, recorded, uri
        self._open = True

    def log(self, values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        # MLflow keeps both tellings of a step that a resumed run repeats, so it is told only what it has not got.
        metrics = [
            Metric(name, value, now, step)
            for name, value in numbers(values).items()
            if step > self._recorded.get(name, -1)
        ]
        with _reported(self._uri):
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, failed: bool = False) -> None:
        if self._open:
            self._open = False
            with _reported(self._uri):
                self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


def _last_steps(client: Any, run_id: str, names: Iterable[str]) -> dict[str, int]:
    return {name: max(point.step for point in client.get_metric_history(run_id, name)) for name in names}


def _log_parameters(client: Any, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    # MLflow's servers refuse longer values; the whole configuration is in the artifact's manifest.
    parameters = [Param(name, value[:_LONGEST_PARAMETER]) for name, value in _flat(scrub_values(config), "")]
    for start in range(0, len(parameters), _PARAMETERS_PER_CALL):
        client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_PER_CALL])


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


@contextlib.contextmanager
def _reported(uri: str | None) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise ResourceError(
            "MLflow does not take the run",
            where=scrub(uri) if uri else "the run's folder",
            why=scrub(str(error)),
            fix="check tracker.tracking_uri (or MLFLOW_TRACKING_URI) and that its server runs",
        ) from error
