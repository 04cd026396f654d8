# SPDX-License-Identifier: Apache-2.0
"""A seed's run is new, and its marks and times are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quickstart_seeds


def test_an_earlier_run_is_not_taken_for_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed3").mkdir()
    with pytest.raises(SystemExit):
        quickstart_seeds.main(["--folder", str(tmp_path), "--seeds", "3"])
    assert f"{tmp_path / 'seed3'} exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.distributed
def test_marks_and_times_of_a_short_run(tmp_path: Path) -> None:
    short = ["--question_steps", "2", "--total_steps", "2", "--save_every", "2", "--eval_every", "2", "--warmup_steps", "1"]
    figures = quickstart_seeds.main(["--folder", str(tmp_path), "--seeds", "1", "--", *short])
    measured = figures["seed 1"]
    assert 0 < measured["minutes"] < 20 and measured["processor_seconds"] > 1
    assert len(measured["right"]) == 8 and all(0 <= share <= 1 for share in measured["right"].values())
