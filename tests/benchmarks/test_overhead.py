# SPDX-License-Identifier: Apache-2.0
"""The benchmark counts every part of what watches a run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.overhead import main
from benchmarks.record import read_record


def test_json(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    main(["--config", "bench-tiny", "--steps", "1", "--calls", "5", "--output", str(out)])
    result = read_record(out).figures
    assert result["overhead_cpu_s"] == sum(result["parts_cpu_s"].values()) and len(result["parts_cpu_s"]) == 7
    assert result["share_of_step"] == result["overhead_cpu_s"] / result["step_cpu_s"] > 0
