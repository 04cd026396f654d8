# SPDX-License-Identifier: Apache-2.0
"""The planner: every sample once per epoch, one global order for any asking and any replica count, resume is continuation."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.keyed_random import keyed_integers, keyed_uniform
from megatron_bagel.data.planner.cost_model import COST_UNIT, Measures
from megatron_bagel.data.planner.planner import Planner, PlannerConfig


@dataclass
class Rows:
    """A source whose lengths depend on sample and epoch, as caption choice and dropout make them."""

    name: str
    size: int
    shortest: int = 3
    longest: int = 40
    weight: float = 1.0
    is_mandatory: bool = False
    keep_position: bool = True

    def __len__(self) -> int:
        return self.size

    def measure(self, indexes: np.ndarray, epoch: int) -> Measures:
        full = self.shortest + keyed_integers(self.longest - self.shortest + 1, 0, self.name, indexes, epoch)
        tokens = np.maximum(full - keyed_integers(3, 1, self.name, indexes, epoch), 1)
        return Measures(tokens, full, tokens * COST_UNIT + tokens * tokens)

    def describe(self, index: int) -> str:
        return f"{self.name}.parquet row {index}"


def config(**changes) -> PlannerConfig:
    return PlannerConfig(**{"max_num_tokens": 100, "expected_num_tokens": 80, "max_num_tokens_per_sample": 60, "window": 8, **changes})


SOURCES = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 35), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.booleans()),
    min_size=1,
    max_size=3,
).filter(lambda rows: any(row[3] for row in rows))


def sources(rows: list[tuple]) -> list[Rows]:
    return [Rows(f"group{i}", size, low, low + spread, weight, flag) for i, (size, low, spread, weight, flag) in enumerate(rows)]


@given(SOURCES, st.integers(0, 2**30), st.integers(0, 40))
@settings(max_examples=15, deadline=None)
def test_every_sample_once_per_epoch(rows: list[tuple], seed: int, window: int) -> None:
    groups = sources(rows)
    planner = Planner(groups, config(seed=seed, window=window, max_num_tokens=200))
    plans = planner.packs(0, 30)
    seen = Counter(sample for plan in plans for sample in plan.samples)
    assert max(seen.values()) == 1
    state = planner.state_dict()
    waiting = Counter(tuple(sample) for sample in state["waiting"])
    planned = Counter(tuple(sample) for pack in state["planned"] for sample in pack)
    skipped = Counter((int(name[5:]), index, epoch) for name, index, epoch in planner.skips.reasons)
    everything = seen + waiting + planned + skipped
    assert max(everything.values()) == 1
    room = 200 - sum(group.longest for group in groups if group.is_mandatory)
    lengths = [int(groups[s].measure(np.array([i]), e).tokens[0]) for s, i, e in skipped if groups[s].longest <= 60]
    assert all(length > room for length in lengths), "a sample that fits beside any mandatory ones was left out"
    for number, place in enumerate(state["places"]):
        size = len(groups[number])
        mine = {(index, epoch) for source, index, epoch in everything if source == number}
        assert len(mine) == place
        assert {(i, e) for e in range(place // size) for i in range(size)} <= mine  # finished epochs are complete


@given(SOURCES, st.integers(0, 2**30))
@settings(max_examples=12, deadline=None)
def test_packs_hold_their_limits_and_mandatory_groups(rows: list[tuple], seed: int) -> None:
    groups = sources(rows)
    for plan in Planner(groups, config(seed=seed, max_num_tokens=250)).packs(0, 20):
        lengths = [int(groups[s].measure(np.array([i]), e).tokens[0]) for s, i, e in plan.samples]
        assert sum(lengths) == plan.tokens <= 250
        assert {number for number, group in enumerate(groups) if group.is_mandatory} <= {s for s, _, _ in plan.samples}


@given(SOURCES, st.integers(0, 2**30), st.integers(0, 12), st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=12, deadline=None)
def test_resume_continues_and_batch_size_does_not_matter(rows: list[tuple], seed: int, stop: int, sizes: list[int]) -> None:
    whole = Planner(sources(rows), config(seed=seed, max_num_tokens=250)).packs(0, stop + sum(sizes))
    first = Planner(sources(rows), config(seed=seed, max_num_tokens=250))
    first.packs(0, stop + 3)  # planned ahead of training, as loaders do
    state = json.loads(json.dumps(first.state_at(stop)))
    again = Planner(sources(rows), config(seed=seed, max_num_tokens=250, global_batch_size=2))
    again.load_state_dict(state)
    made = stop
    for size in sizes:
        assert again.packs(made, size) == whole[made : made + size]
        made += size
    assert again.packs(stop, 1) == whole[stop : stop + 1]
    assert again.packs(0, stop) == whole[:stop]  # before the saved state: planned again from the start
    assert first.packs(stop, 1) == whole[stop : stop + 1]


def test_jumping_ahead_equals_walking() -> None:
    walked = Planner(sources([(20, 3, 30, 1.0, True), (9, 5, 5, 2.0, False)]), config(global_batch_size=3))
    jumped = Planner(sources([(20, 3, 30, 1.0, True), (9, 5, 5, 2.0, False)]), config(global_batch_size=3))
    batches = [walked.batch(step) for step in range(7)]
    assert jumped.batch(6) == batches[6]
    assert jumped.batch(2) == batches[2]


def test_groups_are_drawn_by_weight_and_epochs_differ() -> None:
    planner = Planner([Rows("a", 50, weight=3.0), Rows("b", 50, weight=1.0)], config())
    order = [sample for plan in planner.packs(0, 400) for sample in plan.samples]
    share = np.mean([source == 0 for source, _, _ in order])
    assert abs(share - 0.75) < 0.04
    epochs = [[index for source, index, epoch in order if (source, epoch) == (0, number)] for number in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))


def test_packs_are_full_with_a_window() -> None:
    plans = Planner([Rows("a", 5000, 20, 400)], config(max_num_tokens=2048, expected_num_tokens=1800, window=50)).packs(0, 300)
    assert np.mean([plan.tokens for plan in plans]) / 2048 > 0.995


def test_no_sample_waits_for_ever() -> None:
    """Samples as long as a pack never fit beside a mandatory one; they must be left out by name, not block the window."""
    groups = [Rows("long", 40, 98, 98), Rows("short", 40, 5, 8, is_mandatory=True)]
    planner = Planner(groups, config(max_num_tokens_per_sample=100))
    plans = planner.packs(0, 60)
    assert all(any(source == 1 for source, _, _ in plan.samples) for plan in plans)
    assert planner.skips.counts[0] > 0
    assert any("mandatory" in reason for reason in planner.skips.reasons.values())
    assert len(planner.state_dict()["waiting"]) < 300


def test_a_small_mandatory_group_leaves_nothing_out() -> None:
    """Blocks of one pack, and a window of many packs: samples wait for long, but each comes in its turn."""
    groups = [Rows("first", 24, 20, 30, is_mandatory=True), Rows("second", 8, 10, 40, is_mandatory=True), Rows("third", 16, 3, 40)]
    planner = Planner(groups, config(window=50))
    planner.packs(0, 200)
    assert planner.skips.counts == [0, 0, 0]
    assert max(planner.state_dict()["ages"]) < 40


def test_too_long_samples_are_counted_and_listed() -> None:
    planner = Planner([Rows("mixed", 200, 10, 80)], config(max_num_tokens_per_sample=60))
    planner.packs(0, 40)
    assert planner.skips.counts[0] == len(planner.skips.reasons) > 0
    assert all("longer than 60 tokens" in row["reason"] and "parquet row" in row["where"] for row in planner.skipped())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no dataset group"),
        ([Rows("empty", 0)], "group 'empty' has no sample"),
        ([Rows("a", 3, weight=0.0, is_mandatory=True)], "weight above 0"),
        ([Rows("a", 3, weight=-1.0)], "weight -1.0"),
    ],
)
def test_nothing_to_draw_from(groups: list[Rows], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Planner(groups, config())


def test_only_too_long_samples_end_the_run_with_their_place() -> None:
    with pytest.raises(ValueError, match=r"big\.parquet row \d+ with \d+ tokens.*max_num_tokens_per_sample"):
        Planner([Rows("big", 5, 200, 300)], config()).packs(0, 1)


def test_mandatory_groups_that_never_fit_together() -> None:
    groups = [Rows("a", 5, 60, 60, is_mandatory=True), Rows("b", 5, 60, 60, is_mandatory=True)]
    with pytest.raises(ValueError, match="a, b .*fit together"):
        Planner(groups, config()).packs(0, 1)


def test_changed_data_is_noticed_on_resume() -> None:
    planner = Planner([Rows("a", 50), Rows("b", 20)], config())
    planner.packs(0, 10)
    state = planner.state_dict()
    with pytest.raises(ValueError, match="'b' has 21 samples.*20.*resume_data_status"):
        Planner([Rows("a", 50), Rows("b", 21)], config()).load_state_dict(state)
    anew = Planner([Rows("b", 21, keep_position=False), Rows("a", 50), Rows("c", 9)], config())
    anew.load_state_dict(state)
    assert anew.stream.positions[0] == 0 and anew.stream.positions[1] == state["places"][0]
    state = anew.state_dict()
    assert all(source == 1 for source, _, _ in state["waiting"] + sum(state["planned"], []))
    assert anew.packs(10, 2)


def test_changed_seed_is_said_on_resume(caplog: pytest.LogCaptureFixture) -> None:
    planner = Planner([Rows("a", 50)], config(seed=1))
    planner.packs(0, 3)
    other = Planner([Rows("a", 50)], config(seed=2))
    other.load_state_dict(planner.state_dict())
    assert "--data_seed is 2" in caplog.text and other.packs(3, 2)


def test_blocks_of_many_packs_resume_exactly_even_with_changed_settings() -> None:
    """Packs that were planned come as they were; only what the new settings make impossible is packed anew, and nothing is lost."""
    groups = [Rows("a", 20000), Rows("b", 9000, weight=0.5, is_mandatory=True)]
    whole = Planner(groups, config())
    packs = whole.packs(0, 700)
    assert len(whole.state_at(3)["planned"]) > 100
    state = json.loads(json.dumps(whole.state_at(3)))
    again = Planner(groups, config(window=30, expected_num_tokens=60))
    again.load_state_dict(state)
    count = len(state["planned"])
    assert again.packs(3, count) == packs[3 : 3 + count]
    smaller = Planner(groups, config(max_num_tokens=97))
    smaller.load_state_dict(state)
    kept = smaller.state_dict()
    assert len(kept["planned"]) < count
    assert sorted(kept["waiting"] + sum(kept["planned"], [])) == sorted(state["waiting"] + sum(state["planned"], []))


def test_packs_of_a_step_cost_alike_although_samples_do_not() -> None:
    """Long documents make some packs dearer than any packing can mend; such packs lie side by side."""
    source = Rows("long tail", 400_000, 1, 1)
    source.measure = lambda indexes, epoch: _long_tail(indexes)  # type: ignore[method-assign]
    plans = Planner([source], config(max_num_tokens=36864, expected_num_tokens=32768, max_num_tokens_per_sample=16384)).packs(0, 1024)
    steps = np.array([[pack.tokens, pack.cost] for pack in plans]).reshape(-1, 64, 2)
    token_imbalance, cost_imbalance = (steps.max(axis=1) / steps.mean(axis=1)).mean(axis=0)
    assert token_imbalance < 1.01 and cost_imbalance < 1.03
    assert steps[..., 1].max() / steps[..., 1].mean() > 1.05  # there was something to put side by side


def _long_tail(indexes: np.ndarray) -> Measures:
    tokens = np.exp(6.5 - 1.2 * np.log(1 / keyed_uniform(0, "tail", indexes) - 1) / 1.7).clip(20, 16384).astype(np.int64)
    return Measures(tokens, tokens, tokens * COST_UNIT + (tokens * tokens * 3.1e-5 * COST_UNIT).astype(np.int64))
