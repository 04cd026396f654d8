"""The benchmarks of the data path run, and show the planner's advantages where they do not hang on the machine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.data import main, measure


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(arguments)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("mix", "packs"), [("lognormal", 16), ("images", 640)])
def test_planner_fills_better_than_greedy(mix: str, packs: int) -> None:
    result = measure(mix, packs, replicas=8, window=50)
    planner, greedy = result["planner"], result["greedy"]
    assert planner["fill"] > 0.995 > greedy["fill"]
    assert planner["token_imbalance"] < 1.01 < greedy["token_imbalance"]


def test_sample_data_is_read_fuller_with_the_same_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--rows", "60", "--packs", "8", "--replicas", "1", "--repeats", "1")
    fill = told(capsys, "--part", "sample", *small)
    assert fill["planner"]["fill"] > 0.97 > fill["plain"]["fill"] > 0.5
    loader = told(capsys, "--part", "loader", *small)
    assert loader["equal_pictures"] > 50 and loader["loader"]["samples_per_s"] > 0 and loader["plain"]["samples_per_s"] > 0
    start = told(capsys, "--part", "start", *small)
    assert {"15_rows", "60_rows"} <= set(start) and start["60_rows"]["times_shorter"] > 0


def test_synthetic_sidecars_are_opened_and_planned_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, "--part", "plan", "--samples", "45000")
    assert plan["planner"]["samples"] >= 45000 and plan["planner"]["fill"] > 0.995
    assert 0 < plan["planner"]["first_pack_s"] <= plan["planner"]["total_s"] and plan["plain"]["microseconds_per_sample"] > 0
    opened = told(capsys, "--part", "open", "--samples", "45000")
    assert opened["index"]["samples"] == 45000 and opened["plain"]["samples"] == 450
    assert opened["index"]["open_s"] > 0 and opened["index"]["beyond_imports"] < 200
