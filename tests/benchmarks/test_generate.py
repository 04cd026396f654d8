# SPDX-License-Identifier: Apache-2.0
"""Both ways of generating give the same, which is what makes their times comparable."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.generate import main
from benchmarks.record import read_record


@pytest.mark.slow
def test_cached_and_anew_agree(tmp_path: Path) -> None:
    argv = ["--config", "bench-tiny", "--tokens", "4", "--side", "32", "--steps", "3", "--batch", "2", "--output", str(tmp_path / "a.json")]
    result = main(argv)
    assert read_record(tmp_path / "a.json").figures == result
    assert max(result["largest_difference"].values()) < 1e-4
    assert result["text_cached"]["tokens_per_s"] > 0 and result["picture_anew"]["seconds"] > 0
    assert result["picture_captured"]["seconds"] > 0 and result["largest_difference"]["picture_captured"] == 0
