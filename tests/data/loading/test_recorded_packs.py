# SPDX-License-Identifier: Apache-2.0
"""The four older groups make the packs that they made before the group ``interleaved`` existed, on any number of workers and replicas.

The digests were recorded by this file with the commit 6cada29, the last one without the group. They cover every integer of a pack, and not
pixels, whose last bits depend on the versions of Pillow and torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.group_source import PlanSettings, open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import ConditionDropout
from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import LayoutSpec, Pack
from tests.data.golden_index import CONFIG

STEPS, GLOBAL_BATCH = 12, 4
#: By number of replicas, one digest per replica.
RECORDED = {1: ["bb12dd8c992c0948"], 2: ["c37169d569063040", "1856b595f30860a1"]}
FIELDS = (
    "split_lens", "split_modes", "text_ids", "text_positions", "position_ids", "vae_positions", "latent_shapes", "latent_position_ids",
    "vit_positions", "vit_position_ids", "vit_shapes", "ce_positions", "labels", "mse_positions",
)  # fmt: skip


@pytest.fixture(scope="module")
def groups(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[GroupConfig]:
    """The goldens' three groups and one of plain texts, with their index at ``index`` beside the texts."""
    root = tmp_path_factory.mktemp("four")
    (root / "plain.jsonl").write_text("".join(json.dumps({"text": f"words {number} " * (number % 7 + 1)}) + "\n" for number in range(20)))
    text = {"dataset_names": ["plain"], "weight": 1, "jsonl_path": [str(root / "plain.jsonl")]}
    four = parse_groups({**CONFIG, "text": text}, "four", goldens / "raw_data", goldens / "raw_data")
    build_index(four, goldens / "hf", root / "index", BuildOptions(progress=False))
    return four


def digest(packs: list[Pack]) -> str:
    """A digest of every integer of packs."""
    summed = hashlib.sha256()
    for pack in packs:
        for name in FIELDS:
            summed.update(f"{name} {np.asarray(getattr(pack, name)).astype(np.int64).tolist()}\n".encode())
    return summed.hexdigest()[:16]


def read(goldens: Path, groups: list[GroupConfig], index: IndexedSamples, replica: int, replicas: int, workers: int) -> list[Any]:
    words = load_tokenizer(goldens / "hf")
    spec = LayoutSpec(words.bos, words.eos, words.start_of_image, words.end_of_image, vit_max_side=16, max_latent_size=16)
    sources = open_sources(groups, index, PlanSettings(seed=3, layout=spec, dropout=ConditionDropout()))
    planner = Planner(sources, PlannerConfig(400, 300, 200, 20, seed=3, global_batch_size=GLOBAL_BATCH))
    loader = PackLoader(planner, PackReader(sources, spec, seed=5), replica, replicas, workers)
    packs = [pack for _ in range(STEPS) for pack in next(loader).packs]
    loader.close()
    return packs


@pytest.mark.parametrize(
    ("replica", "replicas", "workers"),
    [(1, 2, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 1, 0), (0, 1, 3), (0, 2, 0)))],
)
def test_packs_are_those_of_before(goldens: Path, groups: list[GroupConfig], replica: int, replicas: int, workers: int) -> None:
    root = Path(groups[-1].datasets[0].location.jsonl_path or "").parent
    packs = read(goldens, groups, IndexedSamples.open(root / "index"), replica, replicas, workers)
    assert {sample.group for pack in packs for sample in pack.pack.samples} == {*CONFIG, "text"}
    assert digest([pack.pack for pack in packs]) == RECORDED[replicas][replica]
