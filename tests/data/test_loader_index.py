"""Planner and loader over a real index: packs hold exactly its samples, workers change no pixel, a killed run continues."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bagel.data.index_reader import IndexedSamples
from megatron_bagel.data.loader import PackLoader, PackReader, StepBatch
from megatron_bagel.data.planner import Planner, PlannerConfig
from megatron_bagel.data.sample_plan import ConditionDropout
from megatron_bagel.data.sources import GroupSource, PlanSettings, open_sources
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import LayoutSpec
from tests.data.golden_index import build_golden_index, golden_groups

CONFIG = PlannerConfig(400, 300, 200, 20, seed=3, global_batch_size=2)


@pytest.fixture(scope="module")
def index(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedSamples:
    return build_golden_index(goldens, tmp_path_factory.mktemp("data") / "index")


@pytest.fixture(scope="module")
def spec(goldens: Path) -> LayoutSpec:
    words = load_tokenizer(goldens / "hf")
    return LayoutSpec(words.bos, words.eos, words.start_of_image, words.end_of_image, vit_max_side=16, max_latent_size=16)


def sources(goldens: Path, index: IndexedSamples, spec: LayoutSpec) -> list[GroupSource]:
    return open_sources(golden_groups(goldens), index, PlanSettings(seed=3, layout=spec, dropout=ConditionDropout()))


def loader(groups: list[GroupSource], spec: LayoutSpec, workers: int = 0) -> PackLoader:
    return PackLoader(Planner(groups, CONFIG), PackReader(groups, spec, seed=5), num_workers=workers)


def same(one: StepBatch, other: StepBatch) -> bool:
    return one.plans == other.plans and all(
        torch.equal(a.vit_patches, b.vit_patches)
        and torch.equal(a.vae_buffer, b.vae_buffer)
        and np.array_equal(a.pack.labels, b.pack.labels)
        for a, b in zip(one.packs, other.packs, strict=True)
    )


def test_packs_are_full_and_hold_every_sample_once_per_epoch(goldens: Path, index: IndexedSamples, spec: LayoutSpec) -> None:
    groups = sources(goldens, index, spec)
    packs = loader(groups, spec)
    loaded = [pack for _ in range(12) for pack in next(packs).packs]
    assert np.mean([pack.pack.sequence_length for pack in loaded]) > 0.97 * CONFIG.max_num_tokens
    seen = Counter((s.dataset, s.index, s.epoch) for pack in loaded for s in pack.pack.samples)
    assert max(seen.values()) == 1
    for name, reader in index.datasets.items():
        rows = {row for dataset, row, epoch in seen if (dataset, epoch) == (name, 0)}
        assert rows == set(range(len(reader)))
    for pack in loaded:
        assert {s.group for s in pack.pack.samples} >= {"t2i_pretrain"}  # the mandatory group


def test_workers_and_resume_change_nothing(goldens: Path, index: IndexedSamples, spec: LayoutSpec) -> None:
    groups = sources(goldens, index, spec)
    whole = loader(groups, spec)
    expected = [next(whole) for _ in range(4)]
    first = loader(groups, spec, workers=2)
    assert all(same(next(first), batch) for batch in expected[:2])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    again = loader(groups, spec, workers=1)
    again.load_state_dict(state)
    assert all(same(next(again), batch) for batch in expected[2:])
    again.close()


def test_pixels_are_those_of_the_source_files(goldens: Path, index: IndexedSamples, spec: LayoutSpec) -> None:
    loaded = next(loader(sources(goldens, index, spec), spec)).packs[0]
    assert len(loaded.vit_patches) == len(loaded.pack.vit_positions)
    images = loaded.vae_images()
    assert len(images) == len(loaded.pack.latent_shapes) > 0
    for pixels in images:
        assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.std() > 0
