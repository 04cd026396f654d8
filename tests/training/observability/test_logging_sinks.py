# SPDX-License-Identifier: Apache-2.0
"""A run's outputs on disk: log.txt, metrics.jsonl, TensorBoard events and the curves, on rank 0 only."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_bagel.training.observability.contact_sheet import SheetRow
from megatron_bagel.training.observability.logging_sinks import RunLog, WandbSettings
from megatron_bagel.training.observability.metrics_file import read_history
from tests.training.observability.test_metrics import metrics
from tests.waiting import eventually


def test_everything_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, rank=0, next_step=0)
    log.info("hello")
    for step in range(4):
        log.log(metrics(step, ce=float("nan") if step == 2 else 0.5))
    log.close()
    # A restart from step 3: its lines are appended to log.txt, its records replace the old ones.
    again = RunLog(tmp_path, rank=0, next_step=3)
    again.log(metrics(3, loss=0.125))
    again.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0].startswith("[20") and lines[0].endswith("] hello")
    assert [line.split("(step=")[1][:7] for line in lines[1:]] == ["0000000", "0000001", "0000002", "0000003", "0000003"]
    assert capsys.readouterr().out.splitlines() == lines
    history = read_history(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in history] == [0, 1, 2, 3] and history[3]["loss"] == 0.125 and history[2]["ce"] is None
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    with Image.open(tmp_path / "loss.png") as picture:
        assert min(picture.size) > 300


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "results", rank=1, next_step=0, wandb=WandbSettings())
    log.info("hello")
    log.log(metrics())
    log.close()
    assert not (tmp_path / "results").exists()


def test_a_run_without_a_logged_step_closes(tmp_path: Path) -> None:
    RunLog(tmp_path, rank=0, next_step=0, tensorboard=False).close()
    assert not (tmp_path / "loss.png").exists()


def test_validation_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(log=lambda record, step: calls.append((step, record)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: run, Image=lambda image: image.size))
    log = RunLog(tmp_path, rank=0, next_step=0, wandb=WandbSettings())
    rows = {"t2i_pretrain": [SheetRow("a red circle", (("made", np.zeros((32, 32, 3), np.uint8)),))]}
    for step in (2, 4):
        log.log_validation(step, {"model/ce": 0.5, "ema/ce": math.nan, "seconds_losses": 1.0})
        log.log_samples(step, rows, [{"prompt": "what color is it?", "answer": "rot ü"}])
    log.close()
    # A restart from the checkpoint of step 2 keeps what was said of the first two steps.
    RunLog(tmp_path, rank=0, next_step=2, tensorboard=False).close(plot=False)
    (record,) = read_history(tmp_path / "validation.jsonl")
    assert record == {"step": 2, "model/ce": 0.5, "ema/ce": None, "seconds_losses": 1.0}
    assert json.loads((tmp_path / "samples/0000004.jsonl").read_text())["answer"] == "rot ü"
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == ["0000002_t2i_pretrain.png", "0000004_t2i_pretrain.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/model/ce")] == [2, 4]
    assert [event.step for event in events.Images("samples/t2i_pretrain")] == [2, 4]
    assert [step for step, _ in calls] == [2, 2, 4, 4] and "samples/t2i_pretrain" in calls[1][1]


def test_wandb_missing_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"megatron-bagel\[logging\]"):
        RunLog(tmp_path, rank=0, next_step=0, tensorboard=False, wandb=WandbSettings())


def test_wandb_gets_the_guides_settings_and_the_originals_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb is optional, so its module is replaced by one that records its calls."""
    calls: list[Any] = []
    run = types.SimpleNamespace(log=lambda record, step: calls.append((step, record)), finish=lambda: calls.append("finish"))
    module = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    settings = WandbSettings("project", "name", "7", "must", offline=True)
    log = RunLog(tmp_path, rank=0, next_step=0, tensorboard=False, wandb=settings, run_config={"lr": 1.0})
    log.log(metrics(5))
    log.close()
    assert calls[0]["mode"] == "offline" and calls[0]["resume"] == "must" and calls[0]["id"] == "name-run7"
    step, record = calls[1]
    assert step == 5 and record["total_norm"] == 1.25 and record["mem_allocated"] == 2048.0 and calls[2] == "finish"


def test_wandb_itself_keeps_its_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package (the extra ``logging``), where it is installed; nothing is sent."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    log = RunLog(tmp_path, rank=0, next_step=0, tensorboard=False, wandb=WandbSettings(offline=True), run_config={"lr": 1.0})
    log.log(metrics(5))
    log.log_validation(6, {"model/ce": 0.5})
    log.log_samples(6, {"t2i_pretrain": [SheetRow("a red circle", (("made", np.zeros((32, 32, 3), np.uint8)),))]}, [])
    log.close()
    (records,) = (tmp_path / "wandb").glob("offline-run-*/run-run-run0.wandb")
    # Its own process writes the file, a moment after the run has ended.
    eventually(lambda: all(name in records.read_bytes() for name in (b"total_norm", b"validation/model/ce")))
    assert list(records.parent.rglob("*.png"))
