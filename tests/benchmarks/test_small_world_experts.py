# SPDX-License-Identifier: Apache-2.0
"""The benchmark of experts in the small world compares models of equal active size, and averages loads over the last steps."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.small_world_experts import active_elements, load_shares, losses_of


def test_shares_are_those_of_the_last_steps(tmp_path: Path) -> None:
    loads = [[[9, 1]], [[1, 3]], [[1, 3]], [[4, 0]]]
    records = [{"step": step, "understanding": {"layers": [2], "load": load}} for step, load in enumerate(loads)]
    (tmp_path / "expert_load.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load_shares(tmp_path) == {"layer 2": [0.5, 0.5]}


def test_losses_are_means_of_the_last_steps_before_each_point() -> None:
    losses = losses_of([{"step": 10 * number, "ce": float(number)} for number in range(12)])
    assert losses == {"step 10": 0.5, "step 30": 2.0, "step 50": 4.0, "step 70": 6.0, "step 90": 8.0, "step 110": 10.0}
    assert losses_of([{"step": 0, "ce": 1.0}]) == {"step 0": 1.0}


def test_both_models_are_active_alike_but_for_the_routers(tmp_path: Path) -> None:
    llm = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps(llm))
    dense, experts = (active_elements(tmp_path, name) for name in ("dense", "experts"))
    assert experts - dense == 3 * 4 * 32
