# SPDX-License-Identifier: Apache-2.0
"""Random interleaved samples on any number of replicas, stopped at any step and continued on any other number: the same packs."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.group_source import PlanSettings, open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import ConditionDropout
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import LayoutSpec
from tests.data.interleaved_rows import index_rows, interleaved_group, item_lists

GLOBAL_BATCH, STEPS = 4, 4


def named(items: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The items with their pictures in files."""

    def name(data: bytes) -> str:
        path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}.png"
        path.write_bytes(data)
        return path.name

    def image(value: Any) -> Any:
        return [name(frame) for frame in value] if isinstance(value, list) else name(value)

    return [{**item, "image": image(item["image"])} if "image" in item else item for item in items]


class Loaders:
    """Makes loaders of one index."""

    def __init__(self, root: Path, goldens: Path, index: IndexedSamples) -> None:
        words = load_tokenizer(goldens / "hf")
        self.spec = LayoutSpec(words.bos, words.eos, words.start_of_image, words.end_of_image, vit_max_side=16, max_latent_size=16)
        dropout = ConditionDropout(0.4, 0.4, 0.4)
        self.sources = open_sources([interleaved_group(root)], index, PlanSettings(seed=3, layout=self.spec, dropout=dropout))

    def all(self, replicas: int) -> list[PackLoader]:
        """The loaders of every replica."""
        config = PlannerConfig(600, 400, 500, 10, seed=3, global_batch_size=GLOBAL_BATCH)
        reader = PackReader(self.sources, self.spec, seed=5)
        return [PackLoader(Planner(self.sources, config), reader, replica, replicas) for replica in range(replicas)]


def step(loaders: list[PackLoader]) -> dict[int, str]:
    """Digests of the packs of a step, pixels included, by their numbers."""
    digests = {}
    for loaded in (pack for loader in loaders for pack in next(loader).packs):
        integers = [loaded.pack.text_ids, loaded.pack.position_ids, loaded.pack.ce_positions, loaded.pack.labels, loaded.pack.mse_positions]
        pixels = [loaded.vit_patches.numpy(), loaded.vae_buffer.numpy(), loaded.raw_timesteps]
        digests[loaded.plan.number] = hashlib.sha256(b"".join(array.tobytes() for array in (*integers, *pixels))).hexdigest()
    return digests


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
@given(st.lists(item_lists(), min_size=2, max_size=6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, STEPS))
def test_any_replicas_and_any_resume_give_the_packs_of_one(goldens: Path, rows: list, first: int, second: int, stop: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        index = index_rows(root, goldens, [{"items": named(items, root / "images")} for items in rows])
        loaders = Loaders(root, goldens, index)
        alone = loaders.all(1)
        expected = [step(alone) for _ in range(STEPS)]
        assert all(len(packs) == GLOBAL_BATCH for packs in expected)
        before = loaders.all(first)
        found = [step(before) for _ in range(stop)]
        state = json.loads(json.dumps(before[0].state_dict()))
        after = loaders.all(second)
        for loader in after:
            loader.load_state_dict(state)
        assert found + [step(after) for _ in range(STEPS - stop)] == expected
