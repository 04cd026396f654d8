# SPDX-License-Identifier: Apache-2.0
"""Learning rates equal the original's where its count is asked for, and start above zero otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_bagel.training.optim.lr_schedule import LearningRate, ScheduleSettings


def _optimizer() -> SimpleNamespace:
    return SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])


def _rates(settings: ScheduleSettings, steps: int) -> list[float]:
    optimizer = _optimizer()
    schedule, used = LearningRate(optimizer, settings), []
    for _ in range(steps):
        assert optimizer.param_groups[0]["lr"] == schedule.lr
        used.append(schedule.lr)
        schedule.step()
    return used


@pytest.mark.parametrize("style", ["constant", "cosine"])
def test_original_count(goldens: Path, style: str) -> None:
    recorded = json.loads((goldens / "train" / "expected.json").read_text())["lr_used_at_step"]
    settings = ScheduleSettings(
        recorded["lr"], recorded["min_lr"], recorded["warmup_steps"], recorded["total_steps"], style, zero_lr_first_step=True
    )
    # The original's cosine rises again after total_steps, where no run goes; ours stays at min_lr.
    steps = recorded["total_steps"] + 1
    assert _rates(settings, steps) == pytest.approx(recorded[style][:steps], rel=1e-12, abs=1e-15)


def test_first_step_learns_and_the_last_warm_up_step_is_full() -> None:
    assert _rates(ScheduleSettings(1.0, warmup_steps=4, total_steps=6), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert _rates(ScheduleSettings(1.0, warmup_steps=0, total_steps=2), 2) == [1.0, 1.0]


def test_cosine_ends_at_the_minimum() -> None:
    rates = _rates(ScheduleSettings(1.0, 0.1, 2, 10, "cosine"), 14)
    assert rates[9:] == pytest.approx([0.1] * 5) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)


def test_warm_up_longer_than_a_constant_run() -> None:
    assert _rates(ScheduleSettings(1.0, warmup_steps=2000, total_steps=3), 3) == pytest.approx([1 / 2000, 2 / 2000, 3 / 2000])


@pytest.mark.parametrize("zero_first", [False, True])
def test_continues_after_a_load_with_the_flags_of_the_new_run(zero_first: bool) -> None:
    settings = ScheduleSettings(1.0, 0.0, 3, 20, "cosine", zero_first)
    full, optimizer = _rates(settings, 12), _optimizer()
    first = LearningRate(_optimizer(), settings)
    for _ in range(5):
        first.step()
    assert first.steps == 5
    second = LearningRate(optimizer, settings)
    optimizer.param_groups[0].update(lr=123.0, max_lr=7.0, min_lr=7.0)
    second.load_state_dict(first.state_dict())
    assert second.steps == 5 and optimizer.param_groups[0]["lr"] == full[5]
    second.step()
    assert optimizer.param_groups[0]["lr"] == full[6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "linear"}, "lr_scheduler"),
        ({"style": "cosine", "warmup_steps": 10}, "warmup_steps"),
        ({"style": "cosine", "min_lr": 2.0}, "min_lr"),
        ({"total_steps": 0}, "total_steps"),
    ],
)
def test_impossible_schedules_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleSettings(**{"lr": 1.0, "total_steps": 10, **change})
