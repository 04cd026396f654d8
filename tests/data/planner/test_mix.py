# SPDX-License-Identifier: Apache-2.0
"""The mix changes over steps, ends after its epochs, and datasets come and go at a resume; the sequence of packs stays one sequence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.data.planner.mix import SourceRule
from megatron_bagel.data.planner.planner import Planner
from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups
from tests.data.index_files import SIZES
from tests.data.planner.test_planner import Rows, config

GBS = 4


def planner(rules: dict[str, SourceRule], *sources: Rows, **changes: Any) -> Planner:
    return Planner(sources, config(global_batch_size=GBS, mix=rules, **changes))


def drawn(plans: list, names: list[str]) -> Counter:
    return Counter(names[source] for plan in plans for source, _, _ in plan.samples)


def test_weights_follow_the_schedule() -> None:
    """From one source alone to the other alone over 200 steps, by a straight line; asked in any way and resumed anywhere."""
    sources = Rows("old", 4000), Rows("new", 4000)
    rules = {"old": SourceRule(((0, 1.0), (200, 0.0))), "new": SourceRule(((0, 0.0), (200, 1.0)))}
    whole = planner(rules, *sources)
    plans = whole.packs(0, 300 * GBS)
    shares = []
    for step in range(0, 300, 50):
        counts = drawn(plans[step * GBS : (step + 50) * GBS], ["old", "new"])
        shares.append(counts["new"] / counts.total())
    assert shares == pytest.approx([0.12, 0.37, 0.62, 0.87, 1.0, 1.0], abs=0.12) and shares == sorted(shares)
    again = planner(rules, *sources)
    assert [again.packs(n, 1)[0] for n in range(0, 300 * GBS, 3)] == plans[::3]
    for stop in (1, 333, 700):
        resumed = planner(rules, *sources)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_at(stop))))
        assert resumed.packs(stop, 150) == plans[stop : stop + 150]


def test_a_constant_schedule_is_a_weight() -> None:
    sources = Rows("a", 100, weight=1.0), Rows("b", 100, weight=3.0)
    assert planner({"b": SourceRule(((0, 3.0),))}, *sources).packs(0, 80) == planner({}, *sources).packs(0, 80)


def test_epochs_end_exactly_and_the_run_says_when_nothing_is_left() -> None:
    sources = Rows("small", 25), Rows("large", 3000)
    plans = planner({"small": SourceRule(((0, 1.0),), max_epochs=2)}, *sources).packs(0, 300)
    seen = Counter(index for plan in plans for source, index, _ in plan.samples if source == 0)
    assert seen == Counter(dict.fromkeys(range(25), 2))
    ending, seen = planner({"small": SourceRule(((0, 1.0),), max_epochs=2)}, sources[0]), Counter()
    with pytest.raises(ValueError, match="every dataset has weight 0 or has reached its max_epochs"):
        for number in range(300):
            seen.update(index for plan in ending.packs(number, 1) for _, index, _ in plan.samples)
    assert seen == Counter(dict.fromkeys(range(25), 2)), "the last samples are not kept back for a choice"


def test_datasets_come_and_go_at_a_resume() -> None:
    """The order of those that stay goes on where it was, whatever joins or leaves."""
    first, second, third = Rows("g/a", 500), Rows("g/b", 500), Rows("g/c", 500)
    before = planner({}, first, second)
    plans = before.packs(0, 40)
    state = json.loads(json.dumps(before.state_at(40)))
    for sources in ((second, third), (second,), (third, first, second)):
        after = planner({}, *sources)
        after.load_state_dict(state)
        number = sources.index(second)
        later = [index for plan in after.packs(40, 200) for source, index, epoch in plan.samples if source == number and epoch == 0]
        earlier = [index for plan in plans for source, index, epoch in plan.samples if source == 1 and epoch == 0]
        assert len(set(later) | set(earlier)) == len(later) + len(earlier)  # each once in the epoch
        assert len(later) + len(earlier) <= 500


def groups(root: Path = Path(), **keys: Any) -> list[GroupConfig]:
    return parse_groups({"t2i_pretrain": {"dataset_names": ["a", "b"], "weight": 1, "image_transform_args": SIZES, **keys}}, "x.yaml", root)


def test_dataset_weights_make_a_stream_per_dataset() -> None:
    (group,) = groups(weight={0: 2, 100: 4}, dataset_weights=[3, {0: 1, 50: 0}], max_epochs=[None, 5])
    a, b = group.parts()
    assert (a.source_name, b.source_name, a.max_epochs, b.max_epochs) == ("t2i_pretrain/a", "t2i_pretrain/b", (None,), (5,))
    assert a.points == ((0, 1.5), (50, 3.0), (100, 4.0)) and b.points == ((0, 0.5), (50, 0.0), (100, 0.0))
    assert [entry.name for entry in a.datasets] == ["a"] and a.name == "t2i_pretrain"
    (plain,) = groups()
    assert plain.parts() == [plain] and plain.source_name == "t2i_pretrain" and plain.points == ((0, 1),)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": {10: 1}}, "map steps to numbers from step 0 on"),
        ({"weight": {0: -1}}, "weight must be a number of at least 0"),
        ({"weight": {0: 1, "x": 2}}, "map steps to numbers"),
        ({"weight": True}, "weight must be a number of at least 0"),
        ({"dataset_weights": [1]}, "dataset_weights needs one entry per dataset name"),
        ({"dataset_weights": [0, 0]}, "dataset_weights are all 0"),
        ({"max_epochs": [1, 2]}, "one number, or dataset_weights beside it"),
        ({"max_epochs": 0}, "max_epochs must be whole numbers of at least 1"),
        ({"is_mandatory": True, "max_epochs": 1}, "a mandatory group is in every pack"),
    ],
)
def test_settings_of_the_mix_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups(**keys)
