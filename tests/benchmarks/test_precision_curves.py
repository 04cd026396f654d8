# SPDX-License-Identifier: Apache-2.0
"""Trainings in two precisions start alike, and one that cannot run has the reason in the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import precision_curves
from benchmarks.precision_curves import compared, main
from benchmarks.record import read_record
from megatron_bagel.platform import has_gpu


@pytest.mark.slow
def test_curves_of_what_runs_and_reasons_of_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tiny", "--out", str(tmp_path), "--precisions", "bf16; fp32; fp8 tensorwise"]
    found = main([*arguments, "--output", str(tmp_path / "record.json")])["precisions"]
    assert read_record(tmp_path / "record.json").figures["precisions"] == found
    assert found["bf16"]["largest_difference"] == 0
    assert 0 < found["fp32"]["largest_difference"] < 0.1
    if not has_gpu():
        assert "needs a GPU" in found["fp8 tensorwise"]["refused"]
    monkeypatch.setattr(precision_curves, "run", lambda *_arguments: pytest.fail("what is there is trained again"))
    assert main([*arguments[:-1], "bf16; fp32"])["precisions"]["fp32"] == found["fp32"]


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"steps": 200, "seed": 0, "tiny": false}')
    with pytest.raises(ValueError, match=r"holds runs with .*200.* choose another --out"):
        main(["--out", str(tmp_path), "--steps", "100"])


def test_differences_are_step_by_step() -> None:
    reference, history = [{"ce": 2.0}, {"ce": 1.0}], [{"ce": 2.5}, {"ce": 0.75}]
    assert compared(history, reference) == {"mean_difference": 0.125, "largest_difference": 0.5}


def test_an_unknown_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--precisions", "fp4"])
    assert "unknown precision fp4; there are bf16" in capsys.readouterr().err
