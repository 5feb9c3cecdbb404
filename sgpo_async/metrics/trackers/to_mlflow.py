"""MLflow: at MLFLOW_TRACKING_URI, else in the folder mlruns beside the run's own folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from sgpo_async.config.load import by_key_path
from sgpo_async.metrics.names import name_of
from sgpo_async.metrics.trackers.base import COLUMNS, About, State

LOCAL = "mlruns"
MANY = 100  # parameters of one request
CHARS = 500  # of a parameter: the shortest limit of MLflow's stores
EVERY = name_of("wall_s")  # a metric that every step has, and that is written last


class MLflow:
    """One run of the experiment that the project names. What was written last is asked of MLflow itself."""

    def __init__(self, about: About) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (about.folder.resolve().parent / LOCAL).as_uri()
        self.note = "" if os.environ.get("MLFLOW_TRACKING_URI") else f"writes to {uri.removeprefix('file://')}"
        self._client = MlflowClient(tracking_uri=uri)
        self.state = self._resume(about.state) if about.state.id else self._begin(about)

    def step(self, step: int, values: Mapping[str, float], counts: Mapping[str, Mapping[int, float]]) -> None:
        """One request. MLflow has no histograms."""
        del counts
        ordered = {name: value for name, value in values.items() if name != EVERY}
        self._log(step, ordered | {name: values[name] for name in (EVERY,) if name in values})

    def samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """A table among the artifacts."""
        table = {"columns": list(COLUMNS), "data": [list(row) for row in rows]}
        self._client.log_dict(self.state.id, table, f"samples/step-{step:08d}.json")

    def summary(self, values: Mapping[str, float]) -> None:
        """Metrics without a history."""
        self._log(self.state.step, {f"final/{name}": value for name, value in values.items()})

    def close(self, *, finished: bool) -> None:
        """Say that the run has finished, or was interrupted."""
        self._client.set_terminated(self.state.id, "FINISHED" if finished else "KILLED")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [Metric(_allowed(name), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.state.id, metrics=metrics)

    def _resume(self, state: State) -> State:
        self._client.update_run(state.id, status="RUNNING")
        steps = [metric.step for metric in self._client.get_metric_history(state.id, EVERY)]
        return replace(state, step=max(steps, default=0))

    def _begin(self, about: About) -> State:
        found = self._client.get_experiment_by_name(about.project)
        experiment = found.experiment_id if found else self._client.create_experiment(about.project)
        run = self._client.create_run(experiment, run_name=about.name).info.run_id
        params = [Param(_allowed(key), str(value)[:CHARS]) for key, value in by_key_path(about.config)]
        for first in range(0, len(params), MANY):
            self._client.log_batch(run, params=params[first : first + MANY])
        self._client.log_text(run, yaml.safe_dump(dict(about.config), sort_keys=False), "config.yaml")
        return replace(about.state, id=run, step=0, samples=0)


def open_run(about: About) -> MLflow:
    """Begin or resume the run."""
    return MLflow(about)


def _allowed(name: str) -> str:
    """The name with the characters that MLflow allows: a benchmark may have letters of any alphabet."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)
