# SPDX-License-Identifier: Apache-2.0
"""Two checkouts' builds are compared round by round; a folder that is no checkout is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.build_beside import compared, main
from benchmarks.record import ROOT


def test_rounds_are_compared_with_their_neighbours() -> None:
    """The second round ran on a busy machine, which slowed both sides down."""
    rounds = [({"text": 1.0}, {"text": 2.0}), ({"text": 8.0}, {"text": 8.0}), ({"text": 2.0}, {"text": 1.0})]
    figures = compared("text", 10, rounds)
    assert (figures["lowest_ratio"], figures["ratio"], figures["highest_ratio"]) == (0.5, 1.0, 2.0)
    assert figures["rows_per_cpu_second"] == 5.0 and figures["other_rows_per_cpu_second"] == 5.0


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is no checkout of this repository" in capsys.readouterr().err


@pytest.mark.slow
def test_this_checkout_beside_itself(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(ROOT), "--rows", "12", "--repeats", "1"])
    printed = capsys.readouterr().out
    figures = json.loads(printed[printed.index("{") :])
    assert set(figures) == {"rows", "repeats", "t2i_pretrain", "unified_edit", "vlm_sft", "text"}
    assert all(figures[group]["ratio"] > 0 for group in ("t2i_pretrain", "text"))
