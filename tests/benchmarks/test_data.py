# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the data path run, and show the planner's advantages where they do not hang on the machine."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given

from benchmarks.data import main, measure
from benchmarks.data_mixes import CAPACITY, EXPECTED, Lengths
from benchmarks.plain_reader import dense_masks
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import build_pack
from tests.strategies import SPEC, samples


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(arguments)
    return json.loads(capsys.readouterr().out)


def test_planner_fills_better_than_greedy() -> None:
    result = measure("lognormal", packs=16, replicas=8, window=50)
    planner, greedy = result["planner"], result["greedy"]
    assert planner["fill"] > 0.995 > greedy["fill"]
    assert planner["token_imbalance"] < 1.01 < greedy["token_imbalance"]


def test_packs_of_large_images_are_full_too() -> None:
    plans = Planner([Lengths("images")], PlannerConfig(CAPACITY, EXPECTED, CAPACITY, 50, seed=1)).packs(0, 640)
    assert sum(plan.tokens for plan in plans) / (640 * CAPACITY) > 0.995


def test_sample_data_is_read_fuller_with_the_same_pixels(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--rows", "60", "--packs", "8", "--replicas", "1", "--repeats", "1")
    fill = told(capsys, "--part", "sample", *small)
    assert fill["planner"]["fill"] > 0.97 > fill["plain"]["fill"] > 0.5
    loader = told(capsys, "--part", "loader", *small)
    assert loader["equal_pictures"] > 50 and loader["loader"]["samples_per_s"] > 0 and loader["plain"]["samples_per_s"] > 0
    stages = told(capsys, "--part", "stages", *small)
    assert all(stages["microseconds_per_sample"][name] > 0 for name in ("samples", "decode", "resize", "send", "receive", "normalize"))
    start = told(capsys, "--part", "start", *small)
    assert {"15_rows", "60_rows"} <= set(start) and start["60_rows"]["times_shorter"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)  # four fresh processes, each with all its imports
def test_synthetic_sidecars_are_opened_and_planned_to_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, "--part", "plan", "--samples", "45000")
    assert plan["planner"]["samples"] >= 45000 and plan["planner"]["fill"] > 0.995
    assert 0 < plan["planner"]["first_pack_s"] <= plan["planner"]["total_s"] and plan["plain"]["microseconds_per_sample"] > 0
    opened = told(capsys, "--part", "open", "--samples", "45000")
    assert opened["index"]["samples"] == 45000 and opened["plain"]["samples"] == 450
    assert opened["index"]["open_s"] > 0 and opened["index"]["beyond_imports"] < 200


@given(samples())
def test_the_plain_readers_masks_are_those_of_the_oracle(drawn: list[Sample]) -> None:
    pack = build_pack(drawn, SPEC)
    dense, start = torch.from_numpy(PackMask.of(pack).dense()), 0
    for length, mask in zip(pack.sample_lens.tolist(), dense_masks(pack), strict=True):
        inside = slice(start, start + length)
        assert torch.equal(mask == 0, dense[inside, inside]) and bool(((mask == 0) | mask.isneginf()).all())
        start += length
