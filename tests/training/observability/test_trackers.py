# SPDX-License-Identifier: Apache-2.0
"""MLflow and trackio, the real packages with local stores, where they are installed (``bash tests/trackers.sh`` installs them)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bagel.training.observability.contact_sheet import SheetRow
from megatron_bagel.training.observability.logging_sinks import RunLog
from megatron_bagel.training.observability.trackers import TrackerSettings
from tests.docs.commands import ROOT
from tests.training.observability.test_metrics import metrics

CONFIG = {"training": {"lr": 1.0, "notes": "x" * 900}}


def _write_run(folder: Path, settings: TrackerSettings, steps: range, run_id: str = "4711-abcdef") -> None:
    log = RunLog(folder, rank=0, next_step=steps.start, tensorboard=False, trackers=settings, run_config=CONFIG, run_id=run_id)
    for step in steps:
        log.log(metrics(step, ce=float("nan") if step == 1 else 0.5))
    log.log_validation(steps.stop, {"model/ce": 0.25})
    log.log_samples(steps.stop, {"t2i_pretrain": [SheetRow("a red circle", (("made", np.zeros((32, 32, 3), np.uint8)),))]}, [])
    log.close()


@pytest.mark.parametrize(("flag", "package"), [("mlflow_uri", "mlflow"), ("trackio_project", "trackio")])
def test_a_missing_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    settings: dict[str, Any] = {flag: "x"}
    with pytest.raises(ValueError, match=rf"--{flag} is given, but the package {package} is not installed: pip install 'megatron-bagel"):
        RunLog(tmp_path, rank=0, next_step=0, tensorboard=False, trackers=TrackerSettings(**settings))


def test_other_ranks_open_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    RunLog(tmp_path, rank=1, next_step=0, trackers=TrackerSettings(mlflow_uri="x")).close()


def test_mlflow_keeps_one_entry_for_a_run_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # a store of its own keeps files in the working folder
    settings = TrackerSettings(mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db", mlflow_experiment="shapes")
    _write_run(tmp_path / "results", settings, range(3))
    _write_run(tmp_path / "results", settings, range(3, 5))
    _write_run(tmp_path / "results", settings, range(1), run_id="another")
    client = mlflow.MlflowClient(tracking_uri=settings.mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("shapes").experiment_id], order_by=["start_time ASC"])
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    (run,) = [run for run in runs if run.data.tags["megatron_bagel.run"] == "4711-abcdef"]
    assert run.data.params["training.lr"] == "1.0" and len(run.data.params["training.notes"]) == 500
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1, 2, 3, 4]
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "train/ce")] == [0, 2, 3, 4], "NaN is left out"
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "validation/model/ce")] == [3, 5]
    assert {file.path for file in client.list_artifacts(run.info.run_id, "samples")} == {
        "samples/0000003_t2i_pretrain.png", "samples/0000005_t2i_pretrain.png",
    }  # fmt: skip


_TRACKIO_RUN = """
import sys
from pathlib import Path
from megatron_bagel.training.observability.trackers import TrackerSettings
from tests.training.observability.test_trackers import _write_run
_write_run(Path(sys.argv[1]), TrackerSettings(trackio_project="shapes"), range(int(sys.argv[2]), int(sys.argv[3])))
"""


def test_trackio_keeps_one_entry_for_a_run_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: the package reads its folder when it is imported, and keeps threads."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for first, end in ((0, 3), (3, 5)):
        words = [sys.executable, "-W", "ignore", "-c", _TRACKIO_RUN, str(tmp_path / "results"), str(first), str(end)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    ask = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as store; names = store.get_runs('shapes'); "
        "print(json.dumps([names, store.get_logs('shapes', names[0])], default=str))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    names, logs = json.loads(done.stdout.splitlines()[-1])
    assert names == ["results-4711-abc"]
    assert [entry["step"] for entry in logs if "train/loss" in entry] == [0, 1, 2, 3, 4]
    assert [entry["step"] for entry in logs if "validation/model/ce" in entry] == [3, 5]
    assert list((tmp_path / "store").rglob("*.png")), "the sheets"
