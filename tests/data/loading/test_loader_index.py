# SPDX-License-Identifier: Apache-2.0
"""Planner and loader over a real index: packs hold exactly its samples, workers change no pixel, a killed run continues."""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.loader import PackLoader, StepBatch
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings, open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import ConditionDropout
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import LayoutSpec, PackImage
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
    return [pack.plan for pack in one.packs] == [pack.plan for pack in other.packs] and all(
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
    assert loaded.vit_patches.dtype == loaded.vae_buffer.dtype == torch.uint8, "floats would take four times the bytes"
    images = [image.normalized() for image in loaded.vae_images()]
    assert len(images) == len(loaded.pack.latent_shapes) > 0
    for pixels in images:
        assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.std() > 0


RUNS = st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(0, 2), st.integers(1, 3), st.integers(0, 2)), min_size=2, max_size=4)


@given(RUNS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_runs_on_any_sizes_train_on_the_same_packs(
    goldens: Path, index: IndexedSamples, spec: LayoutSpec, runs: list[tuple[int, int, int, int]]
) -> None:
    """Each run has its own number of replicas and workers, makes some steps, and is killed some steps after its last checkpoint."""
    groups = sources(goldens, index, spec)
    straight, state, done = loader(groups, spec), None, 0
    expected: list[dict[int, LoadedPack]] = []
    for replicas, workers, steps, lost in runs:
        hands = [
            PackLoader(Planner(groups, CONFIG), PackReader(groups, spec, seed=5), replica, replicas, workers) for replica in range(replicas)
        ]
        for hand in hands if state is not None else ():
            hand.load_state_dict(json.loads(state))
        saved = None
        for step in range(steps + lost):
            while len(expected) <= done + step:
                expected.append({pack.plan.number: pack for pack in next(straight).packs})
            shares = [next(hand) for hand in hands]
            got = {pack.plan.number: pack for share in shares for pack in share.packs}
            assert sorted(got) == sorted(expected[done + step])
            assert all(
                same(StepBatch([got[n]], shares[0].totals), StepBatch([pack], shares[0].totals))
                for n, pack in expected[done + step].items()
            )
            if step + 1 == steps:
                saved = {json.dumps(hand.state_dict()) for hand in hands}
        for hand in hands:
            hand.close()
        (state,) = saved  # the same on every replica
        done += steps
    epochs = Counter((s.dataset, s.index, s.epoch) for step in expected for pack in step.values() for s in pack.pack.samples)
    assert max(epochs.values()) == 1


class WaitsFor:
    """A group whose first picture cannot be read before ``gate`` is there; every picture that was read leaves a file beside it."""

    def __init__(self, group: GroupSource, gate: Path) -> None:
        self._group, self._gate, self._slow = group, gate, gate.with_name("slow")

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_group"], name)

    def pixels(self, index: int, image: PackImage) -> torch.Tensor:
        try:
            self._slow.touch(exist_ok=False)
        except FileExistsError:
            pixels = self._group.pixels(index, image)
            self._gate.with_name(f"read-{index}-{image.kind}-{image.image}").touch()
            return pixels
        while not self._gate.exists():
            time.sleep(0.01)
        return self._group.pixels(index, image)


def test_a_slow_picture_does_not_stop_the_reading_of_others(goldens: Path, index: IndexedSamples, spec: LayoutSpec, tmp_path: Path) -> None:
    """While one worker waits for it, the other reads on as far ahead as it may; the packs come in their order all the same."""
    (group, *_) = sources(goldens, index, spec)
    expected = loader([group], spec)
    slow = PackLoader(Planner([group], CONFIG), PackReader([WaitsFor(group, tmp_path / "gate")], spec, seed=5), num_workers=2)
    others = {index for _, index, _ in next(loader([group], spec)).packs[1].plan.samples}

    def open_the_gate_when_others_are_read() -> bool:
        deadline = time.monotonic() + 120
        while not (read := others <= {int(path.name.split("-")[1]) for path in tmp_path.glob("read-*")}) and time.monotonic() < deadline:
            time.sleep(0.01)
        (tmp_path / "gate").touch()
        return read

    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(open_the_gate_when_others_are_read)
        assert same(next(slow), next(expected)) and read.result()
    assert same(next(slow), next(expected))
    slow.close()


@pytest.mark.slow
def test_memory_is_steady(goldens: Path, index: IndexedSamples, spec: LayoutSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of steps over many epochs leave nothing behind; a pack's pixels alone are half a megabyte."""
    monkeypatch.setattr("megatron_bagel.data.planner.planner._REMEMBERED_PACKS", 16)
    packs = loader(sources(goldens, index, spec), spec)

    def megabytes_after(steps: int) -> float:
        for _ in range(steps):
            next(packs)
        gc.collect()
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    first = megabytes_after(60)
    assert megabytes_after(150) - first < 15
