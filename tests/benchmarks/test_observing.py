"""Watching a run costs less than a hundredth of its processor time, even if every step is logged."""

from __future__ import annotations

import pytest

from benchmarks.observing import main


@pytest.mark.slow
def test_watching_costs_less_than_one_percent(capsys: pytest.CaptureFixture[str]) -> None:
    result = main(["--rounds", "100", "--steps", "1"])
    assert 0 < result["timers_s"] < result["step_s"] and result["share_when_all_are_logged"] < 0.01, result
