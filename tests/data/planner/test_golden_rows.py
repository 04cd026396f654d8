# SPDX-License-Identifier: Apache-2.0
"""Rows that the original packed from files: the same samples, taken from our index, make the same pack, field for field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings
from megatron_bagel.data.planner.sample_plan import ConditionDropout, build_items, choose_items, drop_conditions
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import build_pack, sample_tokens
from tests.data.golden_index import build_golden_index, find_row, golden_groups, golden_row
from tests.layout.golden_fields import GOLDEN_SPEC, assert_equal_to_golden

#: The recorded rows, and the probability with which their conditions were dropped.
ROWS = {"flex_0": 0.0, "flex_1": 0.0, "nested_0": 0.0, "dropall": 1.0, "drop_half_seeded": 0.5}


@dataclass
class Scripted:
    """Draws that follow a script and note how many outcomes each had; past its end they take the first."""

    script: list[int]
    made: list[tuple[int, int]] = field(default_factory=list)

    def choice(self, count: int, what: str) -> int:
        taken = self.script[len(self.made)] if len(self.made) < len(self.script) else 0
        self.made.append((taken, count))
        return taken

    def chance(self, probability: float, what: str) -> bool:
        return probability >= 1 or (probability > 0 and bool(self.choice(2, what)))


@dataclass
class Rows:
    """The goldens' raw data as sources."""

    index: IndexedSamples
    sources: dict[str, GroupSource]
    units: dict[str, Any]

    def candidates(self, name: str, place: Any, dropout: float) -> Iterator[tuple[int, tuple[Item, ...]]]:
        """Everything that a recorded row of raw data can become: (row, items), over all outcomes of all draws."""
        source = self.sources[name]
        reader, group = self.index.reader(source.group, source.group.datasets[0]), source.group
        row = find_row(reader, *golden_row(name, place, self.units[name]["shuffled_units"]))
        record, script = reader.record(row), [0]
        while script:
            draws = Scripted(script)
            planned = drop_conditions(choose_items(record, draws), ConditionDropout(dropout, dropout, dropout), draws)
            yield row, build_items(planned, record, group, lambda text: reader.text_ids(row, text))
            made = draws.made
            while made and made[-1][0] + 1 == made[-1][1]:
                made.pop()
            script = [taken for taken, _ in made[:-1]] + [made[-1][0] + 1] if made else []


@pytest.fixture(scope="module")
def rows(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    index = build_golden_index(goldens, tmp_path_factory.mktemp("index") / "index")
    settings = PlanSettings(0, GOLDEN_SPEC, ConditionDropout(0.0, 0.0, 0.0))
    sources = {g.name: GroupSource(g, [index.reader(g, g.datasets[0])], settings) for g in golden_groups(goldens)}
    return Rows(index, sources, json.loads((goldens / "data/dataset_yields.json").read_text()))


@pytest.mark.parametrize(("name", "dropout"), ROWS.items())
def test_row_equals_the_original(goldens: Path, rows: Rows, name: str, dropout: float) -> None:
    """What the original drew is not recorded: some outcome of the draws must give each sample's tokens and positions. The row made of
    those samples must then be equal in every field, and in the sums of its pixels."""
    golden = json.loads((goldens / f"data/packed_{name}.json").read_text())
    words = dict(zip(golden["packed_text_indexes"], golden["packed_text_ids"], strict=True))
    found, start = [], 0
    for place, length in zip(golden["batch_data_indexes"], golden["sample_lens"], strict=False):
        span = range(start, start + length)
        wanted = [words[i] for i in span if i in words], [golden["packed_position_ids"][i] for i in span]
        for row, items in rows.candidates(place["dataset_name"], place["data_indexes"], dropout):
            sample = Sample(place["dataset_name"], row, 0, items)
            if sample_tokens(sample, GOLDEN_SPEC) == length:
                alone = build_pack([sample], GOLDEN_SPEC)
                if (alone.text_ids.tolist(), alone.position_ids.tolist()) == wanted:
                    found.append(sample)
                    break
        else:
            pytest.fail(f"no outcome of the draws gives sample {len(found)} of the row, {place}")
        start += length
    pack = build_pack(found, GOLDEN_SPEC)
    assert_equal_to_golden(pack, golden)
    if dropout == 1.0:
        return  # without any instruction the integers do not tell which pictures of a chain were taken
    for kind, key in (("vae", "padded_images"), ("vit", "packed_vit_tokens")):
        pixels = [rows.sources[found[i.sample].dataset].picture(found[i.sample].index, i).double() for i in pack.images_of(kind)]
        assert float(sum(p.sum() for p in pixels)) == pytest.approx(golden[key]["sum"], abs=1e-3)
        assert float(sum(p.abs().sum() for p in pixels)) == pytest.approx(golden[key]["abs_sum"], abs=1e-3)
