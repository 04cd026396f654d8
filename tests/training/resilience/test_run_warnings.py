# SPDX-License-Identifier: Apache-2.0
"""Warnings of a run: each is said once, when it is due, with what to do; a healthy run says nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.costs.flops import StepWork
from megatron_bagel.training.losses import LossTotals, StepLosses
from megatron_bagel.training.optim.optimizer import StepOutcome
from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.resilience.run_warnings import RunWarnings, WarningSettings
from megatron_bagel.training.step_result import Counters, StepDone, StepResult, TaskCounts

pytestmark = pytest.mark.usefixtures("single_rank")


def warnings(folder: Path, **settings: Any) -> RunWarnings:
    base = WarningSettings(folder, total_steps=1000, lr=1e-5, safe_lr=1e-4, ema_decay=0.99)
    made = RunWarnings(replace(base, **settings), EventFile(folder))
    made.start()
    return made


def said(folder: Path) -> list[tuple[int, str, str]]:
    file = folder / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [(record["step"], record["event"], record["text"]) for record in map(json.loads, lines)]


def step(number: int, ce: float = 1.0, vae_tokens: int = 50, tasks: dict[str, int] | None = None, mse: float | None = None) -> StepDone:
    losses, totals = StepLosses(ce, ce, mse or 0.0), LossTotals(10, 10.0, 0 if mse is None else 5)
    counts = TaskCounts(tasks, tasks) if tasks is not None else None
    result = StepResult(losses, StepOutcome(True, 1.0), totals, StepWork(tokens=100, vae_tokens=vae_tokens), 2, 1e-5, counts)
    return StepDone(result, Counters(steps=number + 1), 1.0)


def test_a_healthy_run_says_nothing(tmp_path: Path) -> None:
    watch = warnings(tmp_path)
    watch.evaluated(0, {"model/ce": 1.1})
    for number in range(120):
        watch.after_step(step(number, 1.0 - number / 1000, tasks={"vlm": 1}))
        if number % 20 == 19:
            watch.evaluated(number + 1, {"model/ce": 1.0 - number / 2000})
    assert said(tmp_path) == []


def test_settings_that_do_not_fit_the_run_are_said_once_over_restarts(tmp_path: Path) -> None:
    for _ in range(2):
        warnings(tmp_path, total_steps=200, ema_decay=0.9999, lr=1e-3)
    (_, first, horizon), (_, second, rate) = said(tmp_path)
    assert (first, second) == ("ema_horizon", "high_lr")
    assert "98% of the average" in horizon and f"--ema {0.01 ** (1 / 200):.6f}".rstrip("0") in horizon
    assert "Usual rates are up to 0.0001" in rate
    (tmp_path / "fresh").mkdir()
    warnings(tmp_path / "fresh", total_steps=200, ema_decay=0.9999, ema_warmup=True, lr=1e-3, safe_lr=None)
    assert said(tmp_path / "fresh") == []


def test_a_jump_of_the_loss_is_said_once(tmp_path: Path) -> None:
    watch = warnings(tmp_path)
    for number in range(20):
        watch.after_step(step(number, 5.0 if number in (12, 14) else 1.0))
    [(number, kind, text)] = said(tmp_path)
    assert (number, kind) == (12, "loss_jump") and "5, more than 2 times the recent 1" in text


def test_an_expert_and_a_group_that_never_come_are_missed(tmp_path: Path) -> None:
    watch = warnings(tmp_path)
    for number in range(60):
        watch.after_step(step(number, vae_tokens=0, tasks={"vlm": 1, "t2i": 0}))
    events = {kind: (number, text) for number, kind, text in said(tmp_path)}
    assert events.keys() == {"idle_gen", "absent_group_t2i"} and events["idle_gen"][0] == events["absent_group_t2i"][0] == 49
    assert "--visual_gen False" in events["idle_gen"][1] and "raise its weight" in events["absent_group_t2i"][1]
    (tmp_path / "pictures").mkdir()
    watch = warnings(tmp_path / "pictures")
    for number in range(60):
        watch.after_step(step(number, vae_tokens=100))
    [(number, kind, text)] = said(tmp_path / "pictures")
    assert (number, kind) == (49, "idle_und") and "--visual_und False" in text


def test_held_out_loss_that_rises_while_training_loss_falls_is_overfitting(tmp_path: Path) -> None:
    watch = warnings(tmp_path)
    for number, (trained, held_out) in enumerate([(1.0, 1.0), (0.8, 0.9), (0.6, 1.0), (0.4, 1.2)]):
        watch.after_step(step(number, trained))
        watch.evaluated(number + 1, {"model/ce": held_out})
    assert said(tmp_path) and "fewer steps or a smaller --lora_rank" in said(tmp_path)[0][2]
    [(number, kind, text)] = said(tmp_path)
    assert (number, kind) == (4, "overfitting") and "risen from 0.9 to 1.2 while the training loss fell from 0.8 to 0.4" in text


def test_the_first_loss_is_compared_with_the_starting_weights(tmp_path: Path) -> None:
    watch = warnings(tmp_path)
    watch.evaluated(0, {"model/ce": 1.0})
    watch.after_step(step(0, 4.0))
    [(number, kind, _)] = said(tmp_path)
    assert (number, kind) == (0, "first_ce")
    (tmp_path / "pictures").mkdir()
    watch = warnings(tmp_path / "pictures")
    watch.evaluated(0, {"model/ce": 1.0, "model/mse": 1.0})
    watch.after_step(step(0, mse=0.2))
    [(number, kind, text)] = said(tmp_path / "pictures")
    assert (number, kind) == (0, "first_mse") and "megatron-bagel data inspect" in text
