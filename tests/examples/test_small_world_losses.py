# SPDX-License-Identifier: Apache-2.0
"""The comparison of runs reads what training writes, finds the greatest difference, and says where it is."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/small_world/losses.py"
spec = importlib.util.spec_from_file_location("small_world_losses", SCRIPT)
losses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(losses)


def write(run: Path, rows: list[dict], held_out: dict) -> Path:
    (run / "results").mkdir(parents=True)
    (run / "results/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "results/validation.jsonl").write_text(json.dumps(held_out) + "\n")
    return run


def test_the_greatest_difference_is_named_with_its_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"step": step, "ce": 2.0, "mse": 1.0} for step in range(4)]
    other = [dict(row) for row in rows[:3]]  # a run that is behind is compared as far as it came
    other[1]["ce"], other[2]["mse"] = 2.02, 0.75
    one = write(tmp_path / "one", rows, {"model/ce": 1.0, "model/mse": 0.5})
    two = write(tmp_path / "two", other, {})
    tuned = write(tmp_path / "tuned", rows, {"model/ce": 1.01, "model/mse": 0.5})
    losses.main([str(one), str(two), "--continued", str(tuned)])
    said = capsys.readouterr().out
    assert "two against one, greatest relative difference: ce 1.0e-02 (step 1), mse 2.5e-01 (step 2)" in said
    assert "tuned: held-out ce 1.000000 when one ended, 1.010000 after a step (+1.00%)" in said


def test_runs_without_a_common_step_are_refused() -> None:
    with pytest.raises(ValueError, match="no step in common"):
        losses.differences([{"step": 0}], [{"step": 1}])
