# SPDX-License-Identifier: Apache-2.0
"""Measuring arrays of samples gives exactly the lengths and costs of their plans, built one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, open_sources
from megatron_bagel.data.planner.sample_plan import ConditionDropout, PlanSettings
from megatron_bagel.data.sources.dataset_config import parse_groups
from megatron_bagel.layout.pack import LayoutSpec, build_pack
from tests.data.index_files import png, talk, write_lines, write_t2i
from tests.data.planner.measured_sample import measure_sample

SPEC = LayoutSpec(bos=411, eos=412, start_of_image=419, end_of_image=420, vit_max_side=16, max_latent_size=16)
VAE = {"image_stride": 16, "max_image_size": 96, "min_image_size": 32, "max_pixels": 3000}
VIT = {"image_stride": 14, "max_image_size": 70, "min_image_size": 28, "max_pixels": 2500}
CONFIG = {
    "t2i_pretrain": {"dataset_names": ["a", "b"], "weight": 1, "num_used_data": [2, 3], "image_transform_args": VAE},
    "unified_edit": {"dataset_names": ["e"], "weight": 1, "image_transform_args": VAE, "vit_image_transform_args": VIT},
    "vlm_sft": {"dataset_names": ["c"], "weight": 1, "image_transform_args": VIT, "num_used_data": [40], "shuffle_lines": True},
    "text": {"dataset_names": ["p"], "weight": 1},
}


@pytest.fixture(scope="module")
def sources(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, float], list[GroupSource]]:
    root = tmp_path_factory.mktemp("measured")
    rng = np.random.default_rng(0)
    words = ["red", "a blue circle", "two squares on white, large", "x"]

    def captions() -> str:
        return json.dumps({f"k{i}": str(rng.choice(words)) for i in range(rng.integers(0, 4))})

    for name in ("a", "b"):
        write_t2i(root / "t2i" / name, [(png(int(rng.integers(0, 90))), captions()) for _ in range(20)])
    images, texts = [], []
    for _ in range(40):
        count = int(rng.integers(2, 6))
        images.append([png(int(rng.integers(0, 90))) for _ in range(count)])
        texts.append([[str(rng.choice(words)) for _ in range(rng.integers(1, 4))] for _ in range(count - 1)])
    (root / "editing/e").mkdir(parents=True)
    table = {"image_list": pa.array(images, pa.list_(pa.binary())), "instruction_list": pa.array(texts, pa.list_(pa.list_(pa.string())))}
    pq.write_table(pa.table(table), root / "editing/e/0.parquet")
    (root / "vlm/images").mkdir(parents=True)
    for i in range(6):
        (root / f"vlm/images/{i}.png").write_bytes(png(10 * i))
    talks = [talk("see " + "<image> and " * int(n), image=[f"{i}.png" for i in range(n)]) for n in rng.integers(0, 6, 50)]
    write_lines(root / "vlm/c.jsonl", talks)
    write_lines(root / "text/p.jsonl", [{"text": str(rng.choice(words))} for _ in range(20)])
    groups = parse_groups(CONFIG, "x", root, root)
    build_index(groups, goldens / "hf", root / "index", BuildOptions(rows_per_shard=13, progress=False))
    index = IndexedSamples.open(root / "index")
    return {
        (und, p): open_sources(groups, index, PlanSettings(7, SPEC, ConditionDropout(p, p, p), visual_und=und))
        for und, p in ((True, 0.0), (True, 0.4), (False, 0.4))
    }


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize(("visual_und", "dropout"), [(True, 0.0), (True, 0.4), (False, 0.4)])
def test_arrays_equal_plans(sources: dict[tuple[bool, float], list[GroupSource]], visual_und: bool, dropout: float, group: int) -> None:
    if group == 2 and not visual_und:
        return  # conversations are left out of such a run
    source = sources[visual_und, dropout][group]
    order = np.random.default_rng(1).permutation(len(source))
    for epoch in range(3):
        measured = source.measure(order, epoch)
        plans = [source.sample(int(index), epoch) for index in order]
        rows = [measure_sample(plan, SPEC, source.settings.costs) for plan in plans]
        assert np.stack([measured.tokens, measured.full_tokens, measured.cost], 1).tolist() == [list(row) for row in rows]
        assert measured.tokens.tolist() == [build_pack([plan], SPEC).sequence_length for plan in plans]
    assert source.measure(order[:0], 0).tokens.shape == (0,)


def test_passes_over_a_dataset_differ(sources: dict[tuple[bool, float], list[GroupSource]]) -> None:
    """num_used_data 3 of one file: three passes over b beside two over a, each with draws of its own."""
    source = sources[True, 0.4][0]
    assert len(source) == 100
    samples = [source.sample(i, epoch) for i in range(len(source)) for epoch in range(2)]
    assert len({(s.dataset, s.index, s.epoch) for s in samples}) == 200
