# SPDX-License-Identifier: Apache-2.0
"""The benchmark of experts in the small world averages loads over the last steps."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.small_world_experts import load_shares


def test_shares_are_those_of_the_last_steps(tmp_path: Path) -> None:
    loads = [[[9, 1]], [[1, 3]], [[1, 3]], [[4, 0]]]
    records = [{"step": step, "understanding": {"layers": [2], "load": load}} for step, load in enumerate(loads)]
    (tmp_path / "expert_load.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load_shares(tmp_path) == {"layer 2": [0.5, 0.5]}
