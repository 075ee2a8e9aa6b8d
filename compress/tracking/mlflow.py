"""MLflow: `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` say where; the experiment is `bmcompress` by default."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

_LONGEST_VALUE = 500
_MOST_PARAMETERS = 100  # of one request


class MlflowTracker:
    """One run of an experiment; no global state of MLflow's is touched, so a user's own runs go on beside it."""

    def __init__(self, folder: Path):
        pass

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        self._client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bmcompress")
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        parameters = [Param(key[:250], str(value)[:_LONGEST_VALUE]) for key, value in options.items()]
        for begin in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[begin : begin + _MOST_PARAMETERS])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def end(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")
