# SPDX-License-Identifier: Apache-2.0
"""Writes the newest numbers of a run to a text file in Prometheus' format, for the textfile collector of node_exporter.

A file needs no port and cannot slow training down. It is replaced as a whole, so a scrape never reads half of it. The part of a
metric's name after a slash (a dataset, a phase) becomes a label, so that one query shows all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from megatron_bagel.training.observability.metrics import StepMetrics

_PREFIX = "megatron_bagel"
#: First part of a name with a slash -> (name of the metric, name of the label).
_LABELLED = {
    "ce": ("dataset_ce", "dataset"),
    "mse": ("dataset_mse", "dataset"),
    "time": ("phase_seconds", "phase"),
    "time_min": ("phase_seconds_min", "phase"),
    "task_tokens": ("task_tokens", "task"),
    "task_samples": ("task_samples", "task"),
    "expert_tokens": ("expert_tokens", "expert"),
    "imbalance": ("imbalance_ratio", "of"),
    "memory": ("memory", "of"),
}
Row = tuple[str, Mapping[str, str], float]


class PrometheusSink:
    """Writes the file at every logged step and evaluation.

    Its ``running`` is 1 until the run ends by itself. The collector's ``node_textfile_mtime_seconds`` shows the age of a killed run.
    """

    def __init__(self, path: str | Path, results_dir: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._run = {"run": str(results_dir)}
        self._step: list[Row] = []
        self._validation: list[Row] = []
        self._write(running=1)

    def write(self, metrics: StepMetrics) -> None:
        """Write the numbers of a logged step."""
        self._step = [_row(name, value) for name, value in metrics.as_json().items()]
        self._write(running=1)

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write held-out losses, which stay in the file until the next evaluation."""
        self._validation = [("validation_step", {}, step), *(("validation", {"of": name}, value) for name, value in numbers.items())]
        self._write(running=1)

    def write_sheet(self, step: int, name: str, sheet: Image.Image) -> None:
        """Do nothing, because the file cannot contain pictures."""

    def close(self) -> None:
        """Write that the run has ended."""
        self._write(running=0)

    def _write(self, running: int) -> None:
        rows = [("running", {}, running), *self._step, *self._validation]
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Gauges((name, {**self._run, **labels}, value) for name, labels, value in rows))
        # The client writes to a name that does not end in .prom, which node_exporter would read, and renames the file.
        write_to_textfile(str(self.path), registry)
        self.path.chmod(0o644)  # node_exporter runs as another user


class Gauges(Collector):
    """Presents rows as gauges of a registry. Rows with one name share a family, which has the labels of its first row."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._families: dict[str, GaugeMetricFamily] = {}
        for name, labels, value in rows:
            full_name = f"{_PREFIX}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"
            family = self._families.setdefault(full_name, GaugeMetricFamily(full_name, "", labels=list(labels)))
            family.add_metric(list(labels.values()), value)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the gauges in the order of their first rows."""
        return self._families.values()


def _row(name: str, value: float | None) -> Row:
    first, slash, rest = name.partition("/")
    metric, label = _LABELLED.get(first, (first, "of"))
    return (metric, {label: rest}, _float(value)) if slash else (name, {}, _float(value))


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
