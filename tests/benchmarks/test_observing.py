# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what watching a run costs reports every part."""

from __future__ import annotations

import json

import pytest

from benchmarks.observing import main


@pytest.mark.slow
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = main(["--rounds", "5", "--steps", "1"])
    assert json.loads(capsys.readouterr().out) == result
    assert result["timers_s"] > 0 and result["step_s"] > 0 and result["share_when_all_are_logged"] > 0
