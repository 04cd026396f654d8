# SPDX-License-Identifier: Apache-2.0
"""Plans equal the original's when fed the original's draws; keyed draws make them a function of sample and epoch alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings, open_sources
from megatron_bagel.data.planner.planned_item import KeyedDraws
from megatron_bagel.data.planner.sample_plan import (
    ConditionDropout,
    active_groups,
    build_items,
    check_image_limits,
    choose_items,
    drop_conditions,
)
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, VLM, parse_groups
from megatron_bagel.data.sources.records import Record
from megatron_bagel.layout.items import Item
from megatron_bagel.layout.pack import LayoutSpec, PackImage, build_pack
from tests.data.golden_index import build_golden_index, find_row, golden_groups, golden_row

SPEC = LayoutSpec(bos=411, eos=412, start_of_image=419, end_of_image=420, vit_max_side=16, max_latent_size=16)
NO_DROPOUT = ConditionDropout(0.0, 0.0, 0.0)


class MersenneDraws:
    """The original's draws: Python's generator, in the order of the choices."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator

    def choice(self, count: int, what: str) -> int:
        return self.generator.choice(range(count))

    def chance(self, probability: float, what: str) -> bool:
        return self.generator.random() < probability


@pytest.fixture(scope="module")
def index(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedSamples:
    return build_golden_index(goldens, tmp_path_factory.mktemp("index") / "index")


def num_tokens(items: tuple[Item, ...]) -> int:
    """The original's count of a sample: text ids and image tokens, without border tokens."""
    text = sum(len(item.ids) for item in items if item.kind == "text")
    return text + sum(item.height * item.width // {"vae": 16, "vit": 14}[item.kind] ** 2 for item in items if item.kind != "text")


@pytest.mark.parametrize("group", [T2I, EDIT, VLM])
def test_plans_equal_the_goldens(goldens: Path, index: IndexedSamples, group: str) -> None:
    expected = json.loads((goldens / "data/dataset_yields.json").read_text())[group]
    config = next(g for g in golden_groups(goldens) if g.name == group)
    reader = index.reader(config, config.datasets[0])
    source = GroupSource(config, [reader], PlanSettings(0, SPEC, NO_DROPOUT))
    draws = MersenneDraws(random.Random(11))
    for sample in expected["samples"]:
        row = find_row(reader, *golden_row(group, sample["data_indexes"]["data_indexes"], expected["shuffled_units"]))
        record = reader.record(row)
        without_caption = sample["text_ids_list"] == [[220]]  # the original draws nothing for an empty dict of captions
        planned = choose_items(record, KeyedDraws(0, "", 0, 0) if without_caption else draws)
        items = build_items(planned, record, config, lambda text, row=row: reader.text_ids(row, text))
        kinds = {"text": "text", "vae_image": "vae", "vit_image": "vit"}
        assert [(i.kind, int(i.loss)) for i in items] == [(kinds[p["type"]], p["loss"]) for p in sample["sequence_plan"]]
        assert [int(i.droppable) for i in planned] == [p["enable_cfg"] for p in sample["sequence_plan"]]
        assert [i.ids.tolist() for i in items if i.kind == "text"] == sample["text_ids_list"]
        assert num_tokens(items) == sample["num_tokens"]
        images = [i for i in items if i.kind != "text"]
        for item, want in zip(images, sample["image_tensor_list"], strict=True):
            pixels = source.pixels(row, PackImage(item.kind, 0, item.image, item.height, item.width, item.loss, 0, 0)).normalized()
            assert list(pixels.shape) == want["shape"]
            assert float(pixels.double().sum()) == pytest.approx(want["sum"], abs=1e-3)
            assert float(pixels.double().abs().sum()) == pytest.approx(want["abs_sum"], abs=1e-3)


def test_dropout_equals_the_goldens(goldens: Path, index: IndexedSamples) -> None:
    """The first samples of a recorded row at probability 0.5: the recorded draws decide which conditions vanish."""
    row = json.loads((goldens / "data/packed_drop_half_seeded.json").read_text())
    # The first two draws choose nothing here: t2i (mandatory) text, then edit (mandatory) vae, vit and text.
    configs = {g.name: g for g in golden_groups(goldens)}
    lengths = []
    draws = iter(row["_random_random_draws_in_order"])

    class Recorded:
        def choice(self, count: int, what: str) -> int:
            return 0

        def chance(self, probability: float, what: str) -> bool:
            return next(draws) < probability

    for name, file in ((T2I, "t2i/0001.parquet"), (EDIT, "seedxedit_multi/0001.parquet")):
        reader = index.reader(configs[name], configs[name].datasets[0])
        record = reader.record(find_row(reader, file, 0))
        planned = drop_conditions(choose_items(record, Recorded()), ConditionDropout(0.5, 0.5, 0.5), Recorded())
        items = build_items(planned, record, configs[name], lambda text, record=record: np.zeros(record.text_tokens[text]))
        lengths.append(sum(len(i.ids) + 2 if i.kind == "text" else i.height * i.width // (14 if i.kind == "vit" else 16) ** 2 + 2
                           for i in items if not i.dropped))  # fmt: skip
    assert lengths == row["sample_lens"][:2]


def edit_record(alternatives: list[int]) -> Record:
    images = len(alternatives) + 1
    texts = np.arange(10, 10 + 3 * sum(alternatives))
    return Record(EDIT, texts, np.array(alternatives), np.full(images, 48), np.full(images, 48))


def test_every_shape_of_an_editing_chain() -> None:
    """Joined chains have one text; an intermediate image appears noised, clean and for the ViT; the quirk shortens a joined chain."""
    record = edit_record([2, 1, 3])
    seen = set()
    for row in range(400):
        items = choose_items(record, KeyedDraws(0, "edit/x", row, 0))
        kinds = " ".join(("noised" if i.loss else i.kind) if i.kind == "vae" else i.kind for i in items)
        steps = items[-1].image - items[0].image
        seen.add((kinds, steps, max(len(i.texts) for i in items)))
    one, two = "vae vit text noised", "vae vit text noised vae vit text noised"
    assert seen == {(one, 1, 1), (two, 2, 1), (one, 2, 2)}


def test_the_quirk_joins_one_instruction_at_the_end_of_a_row() -> None:
    record = edit_record([1, 1])  # a joined chain can only be 0 -> 2, and 2 is the last image

    class Joined:
        def choice(self, count: int, what: str) -> int:
            return count - 1 if what == "end" else 0

        def chance(self, probability: float, what: str) -> bool:
            return True

    items = choose_items(record, Joined())
    assert [i.texts for i in items if i.kind == "text"] == [(1,)]  # "a.", the ended form
    assert items[-1].image == 1


def test_plans_depend_on_sample_and_epoch_alone(goldens: Path, index: IndexedSamples) -> None:
    settings = PlanSettings(5, SPEC, ConditionDropout(0.5, 0.5, 0.5))
    sources, again = (open_sources(golden_groups(goldens), index, settings) for _ in range(2))
    plans = []
    for first, second in zip(sources, again, strict=True):
        indexes = np.arange(len(first))
        for epoch in range(4):
            measures = first.measure(indexes, epoch)
            for i in indexes[::-1]:
                mine, other = first.sample(int(i), epoch), second.sample(int(i), epoch)
                assert build_pack([mine], SPEC).sequence_length == measures.tokens[i] <= measures.full_tokens[i]
                assert [(x.kind, x.dropped, x.image) for x in mine.items] == [(x.kind, x.dropped, x.image) for x in other.items]
                plans.append((first.name, int(i), tuple((x.kind, x.dropped, x.image) for x in mine.items)))
    assert len(set(plans)) > len({plan[:2] for plan in plans}) * 1.5  # epochs differ


def test_visual_und_off_leaves_the_vit_out(goldens: Path, index: IndexedSamples) -> None:
    groups, reasons = active_groups(golden_groups(goldens), visual_gen=True, visual_und=False)
    assert [g.name for g in groups] == [T2I, EDIT] and "vlm_sft" in reasons[0]
    edit = open_sources(groups, index, PlanSettings(0, SPEC, NO_DROPOUT, visual_und=False))[1]
    assert all(item.kind != "vit" for i in range(len(edit)) for item in edit.sample(i, 0).items)
    groups, reasons = active_groups(golden_groups(goldens), visual_gen=False, visual_und=True)
    assert [g.name for g in groups] == [VLM] and len(reasons) == 2
    with pytest.raises(ValueError, match="no dataset group is left"):
        active_groups(groups, visual_gen=True, visual_und=False)


def group_with(kind: str, max_size: int, stride: int) -> list:
    args = {"image_stride": stride, "max_image_size": max_size, "min_image_size": 16}
    keys = {"dataset_names": ["a"], "weight": 1, "image_transform_args": args}
    return parse_groups({kind: keys}, "x.yaml", Path())


@pytest.mark.parametrize(
    ("kind", "max_size", "stride", "message"),
    [
        (T2I, 272, 16, "lower max_image_size to 256 or raise --max_latent_size to 17"),
        (VLM, 238, 14, "lower max_image_size to 224 or raise --vit_max_num_patch_per_side to 17"),
        (T2I, 256, 8, "image_stride 8 must be a multiple of 16"),
    ],
)
def test_too_large_images_are_refused_from_the_config(kind: str, max_size: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_image_limits(group_with(kind, max_size, stride)[0], SPEC)


def test_images_at_the_limit_are_accepted() -> None:
    check_image_limits(group_with(T2I, 256, 16)[0], SPEC)
    check_image_limits(group_with(VLM, 224, 14)[0], SPEC)


def test_dropout_must_be_a_probability() -> None:
    with pytest.raises(ValueError, match="--vae_cond_dropout_prob"):
        ConditionDropout(vae=1.5)
