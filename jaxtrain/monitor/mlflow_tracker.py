"""Send a run's records to MLflow: a server, or a folder of files."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.core import redact
from jaxtrain.monitor.trackers import Record, RunInfo

TAG = "jaxtrain.run"
METRICS = 1000  # in one request; MLflow accepts no more
PARAMS = 100
ENVIRONMENT = {  # defaults; what the user has set stays
    "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3 refuses a folder otherwise
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # 120 s and 7 retries would report a missing server late
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """One MLflow run for each run, found again by its tag ``jaxtrain.run``.

    The MLflow experiment is ``MLFLOW_EXPERIMENT_NAME``, or the experiment's name; settings are its
    parameters. MLflow adds a metric that it is sent twice, so what the store has is read first and not sent
    again.

    Args:
      uri: of the tracking server, or a folder; None is ``MLFLOW_TRACKING_URI``, or the folder ``mlruns``.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.spec = f"mlflow:{uri}" if uri else "mlflow"
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
        if "://" not in self._uri:
            self._uri = str(Path(self._uri).absolute())
        redact.redact_urls(self._uri)  # masks a password in everything that is printed
        self._client: Any = None
        self._id = ""
        self._has: set[tuple[str, int]] = set()

    def start(self, run: RunInfo) -> None:
        """Find or create the MLflow run, and read which metrics it has."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a warning for every retry
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.name)
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = run.folder.resolve().name
            created = self._client.create_run(experiment, tags={TAG: run.id}, run_name=name)
            self._id = created.info.run_id
        self._log_params(run.config)
        names = self._client.get_run(self._id).data.metrics
        self._has = {
            (name, metric.step)
            for name in names
            for metric in self._client.get_metric_history(self._id, name)
        }

    def write(self, records: Sequence[Record]) -> None:
        """Send the metrics that the store has not got."""
        from mlflow.entities import Metric

        now, metrics = int(1000 * time.time()), []
        for step, values in records:
            for name, value in values.items():
                key = (_metric_name(name), step)
                if key not in self._has:
                    self._has.add(key)
                    metrics.append(Metric(key[0], value, now, step))
        for first in range(0, len(metrics), METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + METRICS])

    def finish(self, status: str) -> None:
        """Set the status of the MLflow run."""
        self._client.set_terminated(self._id, STATUS[status])

    def _experiment(self, name: str) -> str:
        """Return the id of the MLflow experiment, which two runs may create at the same time."""
        for last in (False, True):
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            try:
                return str(self._client.create_experiment(name))
            except Exception:
                if last:
                    raise
        raise AssertionError("unreachable")

    def _log_params(self, config: Any) -> None:
        """Log the settings that the run has not got: MLflow refuses to change one (a longer run's epochs)."""
        from mlflow.entities import Param

        have = self._client.get_run(self._id).data.params
        params = [Param(_metric_name(name), str(value)[:6000]) for name, value in config.items()]
        params = [param for param in params if param.key not in have]
        for first in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[first : first + PARAMS])


def _metric_name(name: str) -> str:
    """Replace the characters of ``name`` that MLflow rejects."""
    return re.sub(r"[^-\w./ ]", "_", name)[:250]
