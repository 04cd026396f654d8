"""The packing benchmark runs, and the planner beats greedy packing where it must: fuller packs, equal token counts."""

from __future__ import annotations

from benchmarks.data import measure


def test_planner_fills_better_than_greedy() -> None:
    result = measure("lognormal", packs=16, replicas=8, window=50)
    planner, greedy = result["planner"], result["greedy"]
    assert planner["fill"] > 0.995 > greedy["fill"]
    assert planner["token_imbalance"] < 1.01 < greedy["token_imbalance"]
