# SPDX-License-Identifier: Apache-2.0
"""Warnings that a save at a signal would not finish: given if and only if the measured times do not fit into the grace time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.resilience.preemption import Grace

SECONDS = st.floats(0.01, 100)


def warnings(folder: Path) -> list[dict]:
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@given(grace=st.one_of(st.none(), SECONDS), steps=st.lists(st.tuples(SECONDS, st.one_of(st.none(), SECONDS)), min_size=1, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_warned_when_it_does_not_fit(
    single_rank: None, tmp_path_factory: pytest.TempPathFactory, grace: float | None, steps: list[tuple[float, float | None]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    watch = Grace(grace, EventFile(folder))
    watch.step_took(1, 1e6, None)  # the first step is like no other
    longest, highest = 0.0, 0.0
    for number, (step, save) in enumerate(steps, start=2):
        before = len(warnings(folder))
        watch.step_took(number, step, save)
        longest = max(longest, step)
        needed = 2 * longest + (save or 0)
        new = warnings(folder)[before:]
        if grace is None or needed <= grace:
            assert new == []
        elif not highest:
            assert [event["event"] for event in new] == ["grace"] and new[0]["needed_s"] == pytest.approx(needed)
        # Not with every step that is a little longer, but before it is much more than the last warning said.
        highest = new[0]["needed_s"] if new else highest
        assert grace is None or needed <= max(grace, 1.1 * highest)


@pytest.mark.parametrize(
    ("grace", "save", "text"),
    [
        (30.0, 12.0, "that should take 12.0 s, like the last save; the scheduler gives 30 s from the signal on"),
        (None, 12.0, "that should take 12.0 s, like the last save"),
        (5.0, None, "the time for that is unknown, because there was no save since the start; the scheduler gives 5 s from the signal on"),
    ],
)
def test_the_outlook_at_the_signal(single_rank: None, tmp_path: Path, grace: float | None, save: float | None, text: str) -> None:
    watch = Grace(grace, EventFile(tmp_path))
    watch.step_took(1, 1.0, save)
    assert watch.outlook() == text
