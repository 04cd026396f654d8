# SPDX-License-Identifier: Apache-2.0
"""A resumed run never leaves a step twice in metrics.jsonl, whatever the kill left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.training.observability.metrics_file import MetricsFile, read_history


@given(st.integers(0, 12), st.integers(0, 14), st.booleans())
def test_kill_and_resume(tmp_path_factory: pytest.TempPathFactory, killed_at: int, resumed_at: int, torn: bool) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    resumed_at = min(resumed_at, killed_at)
    first = MetricsFile(path, next_step=0)
    for step in range(killed_at):
        first.write({"step": step, "loss": step / 3, "run": 1})
    first.close()
    if torn:
        with path.open("a") as file:
            file.write('{"step": 99, "lo')
    second = MetricsFile(path, next_step=resumed_at)
    for step in range(resumed_at, 15):
        second.write({"step": step, "loss": step / 3, "run": 2})
    history = read_history(path)
    assert [record["step"] for record in history] == list(range(15))
    assert [record["run"] for record in history] == [1] * resumed_at + [2] * (15 - resumed_at)
    assert all(record["loss"] == record["step"] / 3 for record in history)


def test_records_are_readable_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl", next_step=0)
    file.write({"step": 0})
    assert read_history(file.path) == [{"step": 0}]


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_history(path)
    path.write_text('{"loss": 0}\n')
    with pytest.raises(ValueError, match="line 1"):
        MetricsFile(path, next_step=3)
    with pytest.raises(ValueError, match="missing.jsonl"):
        read_history(tmp_path / "missing.jsonl")
