# SPDX-License-Identifier: Apache-2.0
"""The benchmark of building prints what its page says, on a few small images."""

from __future__ import annotations

import json

import pytest

from benchmarks.index_build import main


def test_builds_are_held_against_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", "20", "--side", "64", "--words", "4", "--repeats", "1"])
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 20 and set(told["of_floor"]) == {"structure", "header", "decode"}
    assert all(rate > 0 for rate in told["rows_per_cpu_second"].values())
