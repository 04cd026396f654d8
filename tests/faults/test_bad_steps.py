# SPDX-License-Identifier: Apache-2.0
"""Which steps are bad, what the flag makes of them, and that a resumed run judges as the uninterrupted one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.training.losses import StepLosses
from megatron_bagel.training.resilience.bad_steps import HISTORY, Attempt, BadSteps, BadStepSettings
from megatron_bagel.training.resilience.events import EventFile


def attempt(loss: float, norm: float = 1.0, own: float | None = None) -> Attempt:
    fault = not math.isfinite(norm)
    return Attempt(StepLosses(loss, loss, 0.0, int(fault)), norm, torch.tensor([loss if own is None else own], dtype=torch.float64))


def policy(folder: Path, **flags: object) -> BadSteps:
    return BadSteps(BadStepSettings(**flags), EventFile(folder))


@pytest.mark.parametrize("bad", [attempt(math.nan), attempt(math.inf), attempt(1.0, math.nan), attempt(1.0, math.inf)])
def test_numbers_that_are_not_finite_stop_the_run_by_default(single_rank: None, tmp_path: Path, bad: Attempt) -> None:
    with pytest.raises(FloatingPointError, match="step 3: the (loss|gradient) is not finite"):
        policy(tmp_path).attempt(3, lambda: bad)


def test_a_spike_is_skipped_and_a_slow_rise_is_not(single_rank: None, tmp_path: Path) -> None:
    steps = policy(tmp_path, on_bad_step="skip", loss_spike_factor=2.0)
    for step in range(60):
        assert steps.attempt(step, lambda step=step: attempt(1.0 + step / 60))[1]
    assert not steps.attempt(60, lambda: attempt(4.0))[1]
    assert steps.attempt(61, lambda: attempt(2.0))[1], "a spike is no part of what later steps are measured against"
    assert steps.count == 1


def test_too_many_in_a_row_end_the_run(single_rank: None, tmp_path: Path) -> None:
    steps = policy(tmp_path, on_bad_step="skip", max_bad_steps=3)
    bad = attempt(math.nan)
    for step in (0, 1, 3, 4):
        if step == 3:
            assert steps.attempt(2, lambda: attempt(1.0))[1]
        assert not steps.attempt(step, lambda: bad)[1]
    with pytest.raises(FloatingPointError, match="number 3 in a row"):
        steps.attempt(5, lambda: bad)


@pytest.mark.parametrize("second", [attempt(1.0), attempt(math.nan)], ids=["transient", "the same again"])
def test_a_rerun_tells_a_device_from_the_data(single_rank: None, tmp_path: Path, second: Attempt) -> None:
    steps = policy(tmp_path, on_bad_step="rerun")
    assert steps.attempt(0, lambda: attempt(1.0))[1]
    results = iter([attempt(math.nan), second])
    if math.isnan(second.losses.loss):
        with pytest.raises(FloatingPointError, match="The second computation was bad too"):
            steps.attempt(1, lambda: next(results))
        assert "every rank computed the same again" in (tmp_path / "events.jsonl").read_text()
    else:
        assert steps.attempt(1, lambda: next(results)) == (second, True)
        assert "rank 0 (" in (tmp_path / "events.jsonl").read_text()
        # And the machine is ready for the next step.
        assert steps.attempt(2, lambda: attempt(1.0))[1]
    assert next(results, None) is None


@given(st.lists(st.floats(0.1, 10), max_size=HISTORY + 20), st.integers(0, HISTORY + 20))
def test_a_resumed_run_judges_alike(losses: list[float], cut: int) -> None:
    whole, first = policy(Path("."), loss_spike_factor=3.0), policy(Path("."), loss_spike_factor=3.0)

    def judged(steps: BadSteps, some: list[float]) -> list[str]:
        found = []
        for loss in some:
            found.append(steps.problem(attempt(loss)))
            if not found[-1]:
                steps._losses.append(loss)
        return found

    expected = judged(whole, losses)
    before = judged(first, losses[:cut])
    second = policy(Path("."), loss_spike_factor=3.0)
    second.load_state_dict(first.state_dict())
    assert before + judged(second, losses[cut:]) == expected
