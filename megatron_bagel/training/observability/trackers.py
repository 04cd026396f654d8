# SPDX-License-Identifier: Apache-2.0
"""Sends a run's numbers and pictures to MLflow and to trackio, each optional. A resumed run continues its own entry in both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from megatron_bagel.training.observability.metrics import StepMetrics

#: The tag by which a resumed run finds its entry.
_RUN_TAG = "megatron_bagel.run"
#: MLflow refuses longer values of parameters.
_LONGEST_PARAMETER = 500


class Tracker(Protocol):
    """What receives a run's records besides its own files."""

    def write(self, metrics: StepMetrics) -> None:
        """Write the numbers of a logged step."""

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write held-out losses."""

    def write_sheet(self, step: int, name: str, sheet: Image.Image) -> None:
        """Write one sheet of pictures."""

    def close(self) -> None:
        """Write what is left, and end the entry."""


@dataclass(frozen=True)
class TrackerSettings:
    """Where a run is tracked. None leaves a tracker out.

    Attributes:
        mlflow_uri: MLflow's store: a server's URL, or ``sqlite:///FILE``.
        mlflow_experiment: The experiment, which is made if it does not exist.
        trackio_project: trackio's project. The package's own variable TRACKIO_DIR names the folder of its store.
    """

    mlflow_uri: str | None = None
    mlflow_experiment: str = "bagel"
    trackio_project: str | None = None


def open_trackers(settings: TrackerSettings, results_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers that ``settings`` name. Raises ValueError for a package that is not installed."""
    trackers: list[Tracker] = []
    if settings.mlflow_uri is not None:
        trackers.append(MlflowTracker(settings.mlflow_uri, settings.mlflow_experiment, results_dir, run_id, run_config))
    if settings.trackio_project is not None:
        trackers.append(TrackioTracker(settings.trackio_project, results_dir, run_id, run_config))
    return trackers


class MlflowTracker:
    """Sends records through MLflow's client, which writes to a server or to a local store."""

    def __init__(self, uri: str, experiment: str, results_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError as error:
            raise _missing("--mlflow_uri", "mlflow", "mlflow") from error
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        identity = run_id or str(results_dir.resolve())
        earlier = self._client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{identity}'", max_results=1)
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(experiment_id, run_name=results_dir.name, tags={_RUN_TAG: identity}).info.run_id
        for name, value in _flat(run_config):
            self._client.log_param(self._run, name, str(value)[:_LONGEST_PARAMETER])

    def write(self, metrics: StepMetrics) -> None:
        """Send the numbers of a step, under ``train/``."""
        self._log("train", metrics.step, {name: value for name, value in metrics.as_json().items() if name != "step"})

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send held-out losses, under ``validation/``."""
        self._log("validation", step, numbers)

    def write_sheet(self, step: int, name: str, sheet: Image.Image) -> None:
        """Send one sheet of pictures as a file of the run."""
        self._client.log_image(self._run, sheet, f"samples/{step:07d}_{name.replace('/', '_')}.png")

    def close(self) -> None:
        """End the run's entry."""
        self._client.set_terminated(self._run)

    def _log(self, kind: str, step: int, numbers: Mapping[str, Any]) -> None:
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._run, [self._metric(f"{kind}/{name}", value, now, step) for name, value in _finite(numbers).items()])


class TrackioTracker:
    """Sends records to trackio, whose store is a folder on this machine unless its own variables name a Space."""

    def __init__(self, project: str, results_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> None:
        try:
            import trackio
        except ImportError as error:
            raise _missing("--trackio_project", "trackio", "trackio") from error
        self._trackio = trackio
        # The name tells a resumed run from another one in a folder of the same name.
        name = f"{results_dir.name}-{run_id[:8]}" if run_id else results_dir.name
        self._run = trackio.init(
            project=project, name=name, config=dict(_flat(run_config)), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def write(self, metrics: StepMetrics) -> None:
        """Send the numbers of a step, under ``train/``."""
        numbers = {name: value for name, value in metrics.as_json().items() if name != "step"}
        self._run.log({f"train/{name}": value for name, value in _finite(numbers).items()}, step=metrics.step)

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send held-out losses, under ``validation/``."""
        self._run.log({f"validation/{name}": value for name, value in _finite(numbers).items()}, step=step)

    def write_sheet(self, step: int, name: str, sheet: Image.Image) -> None:
        """Send one sheet of pictures."""
        self._run.log({f"samples/{name}": self._trackio.Image(sheet)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _missing(flag: str, package: str, extra: str) -> ValueError:
    return ValueError(
        f"{flag} is given, but the package {package} is not installed: pip install 'megatron-bagel[{extra}]', or leave the flag out"
    )


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that a store can hold: neither missing nor NaN nor infinite."""
    return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested mappings, with names joined by dots."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
