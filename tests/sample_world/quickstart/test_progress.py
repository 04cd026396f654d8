# SPDX-License-Identifier: Apache-2.0
"""The bar follows a run in another process by its files, whatever moment it looks at them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_bagel.sample_world.quickstart.progress import TrainingBar


def record(step: int) -> str:
    return json.dumps({"step": step, "mse": 0.5, "ce": 0.0}) + "\n"


def test_the_bar_follows_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingBar(tmp_path, "pictures") as bar:
        bar.update()  # nothing there yet
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"x": 1}, "training": {"total_steps": 40}}))
        bar.update()
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text(record(0) + record(9)[:7])  # a line that is being written
        bar.update()
        assert bar._bar is not None and (bar._bar.n, bar._bar.total) == (1, 40)
        metrics.write_text(record(0) + record(9))
        bar.update()
        assert bar._bar.n == 10
        (tmp_path / "samples").mkdir()
        sheet = tmp_path / "samples/0000020_t2i.png"
        sheet.write_bytes(b"")
        bar.update()
        bar.update()
    assert capsys.readouterr().out.count(f"new pictures: {sheet}") == 1


def test_a_run_that_continues_is_shown_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"training": {"total_steps": 40}}))
    (tmp_path / "metrics.jsonl").write_text(record(0) + record(29))
    with TrainingBar(tmp_path, "pictures") as bar:
        bar.update()
        assert bar._bar is not None and bar._bar.n == 30
