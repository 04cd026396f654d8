# SPDX-License-Identifier: Apache-2.0
"""Interleaved samples of any items: lengths known before reading, losses where the schema asked for them, and nothing seen too early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.index.columns import PlanningColumns, Ragged
from megatron_bagel.data.planner.planned_item import ConditionDropout, KeyedDraws
from megatron_bagel.data.planner.sample_lengths import measure_rows
from megatron_bagel.data.planner.sample_plan import PlanSettings, build_items, choose_items, drop_conditions
from megatron_bagel.data.sources.dataset_config import INTERLEAVED, parse_groups
from megatron_bagel.data.sources.interleaved import parse_items
from megatron_bagel.data.sources.pictures import Pictures
from megatron_bagel.data.sources.records import RawSample, Record
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import DEFAULT_RULES
from megatron_bagel.data.sources.stored_items import NEXT_TOKENS
from megatron_bagel.data.sources.unit import SourceUnit
from megatron_bagel.data.transforms import decoded_size
from megatron_bagel.layout.items import Item, Mode, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import Pack, build_pack, item_tokens
from tests.data.interleaved_rows import VAE, VIT, item_lists, picture
from tests.data.planner.measured_sample import measure_sample
from tests.strategies import SPEC

KEYS = {"dataset_names": ["a"], "weight": 1, "image_transform_args": VAE, "vit_image_transform_args": VIT}
GROUP = parse_groups({INTERLEAVED: KEYS}, "x.yaml", "/")[0]
PICTURES = Pictures(SourceUnit(INTERLEAVED, "x", 0, 0, 1))


def parse(items: list[dict[str, Any]]) -> RawSample:
    return parse_items(items, PICTURES, RowFormat("parquet"), DEFAULT_RULES)


@dataclass
class Stored:
    """Samples as an index holds them: one token per character, sizes of the pictures."""

    samples: list[RawSample]

    def record(self, row: int) -> Record:
        sample = self.samples[row]
        sizes = np.array([decoded_size(data) for data in sample.images], dtype=np.int32).reshape(-1, 2)
        lengths = np.array([len(text) for text in sample.texts], dtype=np.int32)
        return Record(INTERLEAVED, lengths, np.array(sample.structure, dtype=np.int32), sizes[:, 0], sizes[:, 1])

    def columns(self) -> PlanningColumns:
        records = [self.record(row) for row in range(len(self.samples))]

        def ragged(name: str) -> Ragged:
            values = [getattr(record, name) for record in records]
            return Ragged(np.cumsum([0, *map(len, values)]), np.concatenate(values).astype(np.int32))

        return PlanningColumns(*(ragged(name) for name in ("text_tokens", "structure", "widths", "heights")))

    def plan(self, row: int, epoch: int, settings: PlanSettings) -> Sample:
        draws, record = KeyedDraws(settings.seed, "interleaved/a", row, epoch), self.record(row)
        planned = drop_conditions(choose_items(record, draws), settings.dropout, draws)
        planned = [item for item in planned if settings.visual_und or item.kind != "vit"]
        texts = self.samples[row].texts
        items = build_items(planned, record, GROUP, lambda text: np.array([10 + ord(c) for c in texts[text]]), settings.next_tokens)
        return Sample("interleaved/a", row, epoch, items)


@settings(max_examples=60, deadline=None)
@given(st.lists(item_lists(), min_size=1, max_size=4), st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.booleans())
def test_lengths_known_before_reading_equal_what_is_read(rows: list, dropout: float, visual_und: bool, own: bool) -> None:
    """Dropout, alternatives, clips and the ViT switch: arrays of samples measure what their packs become, and cost."""
    stored = Stored([parse(items) for items in rows])
    plan_settings = PlanSettings(3, SPEC, ConditionDropout(dropout, dropout, dropout, own), visual_und)
    order = np.arange(len(rows))[::-1].copy()
    for epoch in range(2):
        measured = measure_rows(stored.columns(), order, "interleaved/a", order, epoch, GROUP, plan_settings)
        plans = [stored.plan(int(row), epoch, plan_settings) for row in order]
        assert measured.T.tolist() == [list(measure_sample(plan, SPEC, plan_settings.costs)) for plan in plans]
        assert measured[0].tolist() == [build_pack([plan], SPEC).sequence_length for plan in plans]


def spans(sample: Sample) -> list[tuple[Item, range]]:
    """The items that dropout left, with the positions of their tokens."""
    found, start = [], 0
    for item in sample.items:
        length = item_tokens(item, SPEC)
        if length:
            found.append((item, range(start, start + length)))
        start += length
    return found


@settings(max_examples=60, deadline=None)
@given(item_lists(), st.integers(0, 3))
def test_every_loss_is_one_that_the_schema_asked_for(items: list[dict[str, Any]], epoch: int) -> None:
    """Read from the row itself: learned texts predict each of their tokens and their end, drawn pictures all their latents."""
    plan_settings = PlanSettings(3, SPEC, ConditionDropout(0.4, 0.4, 0.4))
    sample = Stored([parse(items)]).plan(0, epoch, plan_settings)
    pack = build_pack([sample], SPEC)
    labels = [int(label) for label in pack.labels]
    drawn = [frame for item in items if item.get("loss") for frame in (_frames(item))]
    noised = [item for item, _ in spans(sample) if item.kind == "vae" and item.loss]
    assert len(noised) == len(drawn) and len(pack.mse_positions) == sum(item_tokens(item, SPEC) - 2 for item in noised)
    learned = [item for item in items if "text" in item and (item.get("loss") or item.get("role") == "assistant")]
    choices = [[text] if isinstance(text, str) else text for text in (item["text"] for item in learned)]
    texts = [item for item, _ in spans(sample) if item.kind == "text" and item.loss]
    assert len(texts) == len(learned)
    words = ["".join(chr(int(i) - 10) for i in item.token_ids) for item in texts]
    assert all(word in choice for word, choice in zip(words, choices, strict=True))
    ends = [name for name in (item.get("next_token") for item in items) if name]
    by_name = dict(zip(NEXT_TOKENS, plan_settings.next_tokens, strict=True))
    own = [by_name[name] for name in ends]
    assert len(labels) <= sum(len(word) + 1 for word in words) + len(own)  # an end goes with a dropped item
    for (_, span), word in zip([(i, s) for i, s in spans(sample) if i.kind == "text" and i.loss], words, strict=True):
        wanted = [*(10 + ord(c) for c in word), SPEC.eos]
        at = np.flatnonzero(np.isin(pack.ce_positions, list(span)[: len(wanted)]))
        assert pack.labels[at].tolist() == wanted and pack.ce_positions[at].tolist() == list(span)[: len(wanted)]
    others = set(pack.ce_positions.tolist()) - {p for i, s in spans(sample) if i.kind == "text" and i.loss for p in list(s)[:-1]}
    assert others == {span[-1] for item, span in spans(sample) if item.special_token_label is not None}


def _frames(item: dict[str, Any]) -> list[Any]:
    return item["image"] if isinstance(item.get("image"), list) else [item["image"]] if "image" in item else []


@settings(max_examples=60, deadline=None)
@given(item_lists(), st.integers(0, 3))
def test_nothing_sees_what_comes_after(items: list[dict[str, Any]], epoch: int) -> None:
    """A token sees nothing of a later item but the frames of its own clip, and nothing sees a noised picture but itself."""
    sample = Stored([parse(items)]).plan(0, epoch, PlanSettings(3, SPEC, ConditionDropout(0.4, 0.4, 0.4)))
    pack = build_pack([sample], SPEC)
    dense = PackMask.of(pack).dense()
    kept = spans(sample)
    for number, (item, span) in enumerate(kept):
        own = clip_of(kept, number)
        assert not np.delete(dense[list(span)], np.r_[0 : span.stop, own], axis=1).any()
        if item.kind == "vae" and item.loss and item.frame_delta is None and item.split_start:
            assert not np.delete(dense[:, list(span)], list(span), axis=0).any()
        else:
            assert dense[span.stop :, list(span)].all()  # later items see all of it


def clip_of(kept: list[tuple[Item, range]], number: int) -> list[int]:
    """Positions of the split that an item is in."""
    first = next(i for i in range(number, -1, -1) if kept[i][0].split_start)
    last = next(i for i in range(number, len(kept)) if kept[i][0].split_end)
    return [position for _, span in kept[first : last + 1] for position in span]


def modes(pack: Pack) -> list[str]:
    return [Mode(mode).name for mode in pack.split_modes]


def test_what_follows_a_drawn_picture_sees_it_clean() -> None:
    """Question, thought, picture, answer: the answer sees the clean copy and the ViT copy of the picture, not the noised one."""
    sample = Stored(
        [
            parse(
                [
                    {"text": "q", "role": "user"},
                    {"text": "hm", "role": "assistant"},
                    {"image": picture(40, 40), "role": "assistant"},
                    {"text": "a", "role": "assistant"},
                ]
            )
        ]
    ).plan(0, 0, PlanSettings(0, SPEC, ConditionDropout(1.0, 1.0, 1.0)))
    assert [(item.kind, item.loss) for item in sample.items] == [
        ("text", False), ("text", True), ("vae", True), ("vae", False), ("vit", False), ("text", True),
    ]  # fmt: skip
    pack = build_pack([sample], SPEC)
    assert modes(pack) == ["CAUSAL", "CAUSAL", "NOISE", "FULL", "FULL", "CAUSAL"]
    noised, clean, vit = (span for item, span in spans(sample) if item.kind != "text")
    answer = PackMask.of(pack).dense()[-1]
    assert not answer[list(noised)].any() and answer[list(clean)].all() and answer[list(vit)].all()
    last = parse([{"text": "q"}, {"image": picture(40, 40), "role": "assistant"}])
    assert [item.kind for item in Stored([last]).plan(0, 0, PlanSettings(0, SPEC)).items] == ["text", "vae"]


@pytest.mark.parametrize(("droppable", "gone"), [(True, True), (False, False), (1.0, True), (0.0, False)])
def test_an_own_probability_goes_before_the_flag(droppable: object, gone: bool) -> None:
    rows = Stored([parse([{"text": "q", "droppable": droppable}, {"text": "a", "loss": True}])])
    flag = 1.0 if isinstance(droppable, bool) else 0.5
    dropped = [rows.plan(0, epoch, PlanSettings(0, SPEC, ConditionDropout(text=flag))).items[0].dropped for epoch in range(8)]
    assert dropped == [gone] * 8
    held_out = PlanSettings(0, SPEC, ConditionDropout(0.0, 0.0, 0.0, own=False))
    assert not rows.plan(0, 0, held_out).items[0].dropped  # held-out samples keep all their conditions
