# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step: counts by task that add up over ranks, and counters that move by one step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.training.step_result import Counters, StepDone, TaskCounts
from tests.training.observability.test_metrics import metrics

TASKS = ("t2i", "edit", "vlm")
SAMPLES = st.lists(st.tuples(st.sampled_from(TASKS), st.integers(1, 100)), max_size=6)


def loaded(samples: list[tuple[str, int]], cost: float = 0.0) -> SimpleNamespace:
    """As much of a loaded pack as is counted."""
    lengths = np.array([length for _, length in samples], dtype=np.int64)
    pack = SimpleNamespace(
        samples=[SimpleNamespace(dataset=f"{task}/some") for task, _ in samples], sample_lens=lengths, sequence_length=int(lengths.sum())
    )
    return SimpleNamespace(pack=pack, plan=SimpleNamespace(cost=cost))


@given(st.lists(SAMPLES, max_size=4), st.integers(0, 4))
def test_counts_of_two_ranks_add_up_to_those_of_one(packs: list[list[tuple[str, int]]], cut: int) -> None:
    everything = [loaded(samples) for samples in packs]
    parts = [TaskCounts.of(part, TASKS).to_list() for part in (everything[:cut], everything[cut:])]
    summed = TaskCounts.from_list([a + b for a, b in zip(*parts, strict=True)], TASKS)
    assert summed == TaskCounts.of(everything, TASKS)
    assert sum(summed.tokens.values()) == sum(length for samples in packs for _, length in samples)
    assert sum(summed.samples.values()) == sum(map(len, packs))


def test_counters_move_by_what_a_step_was_trained_on() -> None:
    result = metrics().done.result
    before = Counters(steps=4, samples=100, tokens=1000, skipped=1)
    after = before.after(result, skipped=3, bad_steps=2)
    assert after == Counters(steps=5, samples=108, tokens=1300, skipped=3, bad_steps=2)
    assert before.steps == 4 and StepDone(result, after, 1.0).step == 4
