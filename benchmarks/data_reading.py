# SPDX-License-Identifier: Apache-2.0
"""Reading sample data: how full packs are, how fast one worker hands them out, how long the first one takes; beside the plain reader.

`benchmarks/data.py` prints these numbers (``--part sample``, ``--part loader``, ``--part start``).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.plain_reader import PlainPack, PlainReader
from megatron_bagel.cli.data import sample as make_sample_data
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.group_source import open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import PlanSettings
from megatron_bagel.data.sources.dataset_config import GroupConfig, load_groups
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.data.transforms import ready_images, ready_patches
from megatron_bagel.layout.pack import LayoutSpec

SEED, SHARE = 1, 0.9  # a pack is expected to be this full
PATCH = 3 * 14 * 14  # values of a ViT patch


@dataclass(frozen=True)
class World:
    """Sample data on disk with its index, and what both readers need to make packs of ``capacity`` tokens of it."""

    root: Path
    groups: list[GroupConfig]
    tokenizer: Tokenizer
    capacity: int

    @property
    def spec(self) -> LayoutSpec:
        words = self.tokenizer
        return LayoutSpec(words.bos, words.eos, words.start_of_image, words.end_of_image, vit_max_side=128, max_latent_size=128)

    def plain(self, keep: bool = False) -> PlainReader:
        """The plain reader over the source files."""
        return PlainReader(self.groups, self.tokenizer, self.spec, self.capacity, int(SHARE * self.capacity), SEED, keep)

    def loader(self, workers: int = 0) -> PackLoader:
        """The loader over the index, one pack per step."""
        index = IndexedSamples.open(self.root / "index", self.tokenizer)
        sources = open_sources(self.groups, index, PlanSettings(SEED, self.spec))
        config = PlannerConfig(self.capacity, int(SHARE * self.capacity), self.capacity, 50, SEED)
        return PackLoader(Planner(sources, config), PackReader(sources, self.spec, SEED, decode_threads=2), num_workers=workers)


@contextlib.contextmanager
def make_world(rows: int, side: int, capacity: int) -> Iterator[World]:
    """``rows`` rows: two fifths T2I, two fifths edits, one fifth conversations, pictures of ``side`` pixels."""
    counts = {"t2i": rows * 2 // 5, "edit": rows * 2 // 5, "vlm": rows - 2 * (rows * 2 // 5)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            make_sample_data.main([str(root / "data"), *words, "--image-size", str(side)])
        groups = load_groups(root / "data/dataset.yaml")
        build_index(groups, root / "data/tokenizer", root / "index", BuildOptions(progress=False))
        yield World(root, groups, load_tokenizer(root / "data/tokenizer"), capacity)


def measure_fill(rows: int, side: int, capacity: int, packs: int) -> dict[str, object]:
    """Mean tokens over capacity of packs of sample data."""
    with make_world(rows, side, capacity) as world:
        ours = [plan.tokens for plan in world.loader().planner.packs(0, packs)]
        plain = [row.tokens for row in islice(world.plain(), packs)]
    return {
        "rows": rows, "capacity": capacity, "packs": packs,
        "planner": {"fill": float(np.mean(ours) / capacity)}, "plain": {"fill": float(np.mean(plain) / capacity)},
    }  # fmt: skip


def _rate(packs: Iterator[LoadedPack | PlainPack], count: int) -> tuple[float, float]:
    """(samples, text and picture tokens) per second over ``count`` packs after the first, with their pixels normalised in this process."""
    next(packs)
    began, samples, tokens = time.perf_counter(), 0, 0
    for loaded in islice(packs, count):
        plain = isinstance(loaded, PlainPack)
        samples += loaded.count if plain else len(loaded.pack.samples)
        tokens += loaded.tokens if plain else loaded.pack.sequence_length
        if not plain:  # an encoder would do this on its device
            _ = ready_images(loaded.vae_images(), "cpu"), ready_patches(loaded.vit_images(), PATCH, "cpu")
    seconds = time.perf_counter() - began
    return samples / seconds, tokens / seconds


def _ours(world: World, workers: int) -> Iterator[LoadedPack]:
    loader = world.loader(workers)
    try:
        while True:
            yield from next(loader).packs
    finally:
        loader.close()


def _plain(world: World) -> Iterator[PlainPack]:
    return iter(DataLoader(world.plain(), batch_size=None, num_workers=1, prefetch_factor=2))


def same_pixels(world: World, packs: int) -> int:
    """How many pictures, read by both from the same rows with the same draws, were compared. Raises ValueError where one differs."""
    plain: dict[tuple, torch.Tensor] = {}
    for row in islice(world.plain(keep=True), packs):
        for each in row.samples:
            plain.update({(each.sample.dataset, each.sample.index, *key): pixels for key, pixels in each.pixels.items()})
    compared = 0
    reader = world.loader().reader
    for source in reader.sources:
        for index in range(len(source)):
            sample = source.sample(index, 0)
            for item in sample.items:
                pixels = plain.get((sample.dataset, sample.index, item.image, item.kind))
                if pixels is not None and item.kind != "text":
                    if not torch.equal(source.pixels(index, item).normalized(), pixels):
                        raise ValueError(f"{source.describe(index)}: the pixels of the two readers differ")
                    compared += 1
    return compared


def measure_loader(rows: int, side: int, capacity: int, packs: int, repeats: int) -> dict[str, object]:
    """Samples per second of one worker, the best of ``repeats`` rounds in turn."""
    with make_world(rows, side, capacity) as world:
        rates: dict[str, list[tuple[float, float]]] = {"loader": [], "plain": []}
        for _ in range(repeats):
            rates["loader"].append(_rate(_ours(world, 1), packs))
            rates["plain"].append(_rate(_plain(world), packs))
        compared = same_pixels(world, packs)
    best = {name: max(each) for name, each in rates.items()}
    return {
        "rows": rows, "side": side, "capacity": capacity, "packs": packs, "equal_pictures": compared,
        **{name: {"samples_per_s": samples, "tokens_per_s": tokens} for name, (samples, tokens) in best.items()},
        "times_plain": best["loader"][0] / best["plain"][0],
    }  # fmt: skip


def _seconds(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def measure_start(rows: int, side: int, capacity: int, repeats: int) -> dict[str, object]:
    """Seconds from opening the data to the first pack, read in this process, at ``rows`` and at a quarter of them.

    Imports, the tokenizer and the dataset YAML are there before; both readers need them.
    """
    result: dict[str, object] = {"side": side, "capacity": capacity}
    for count in (rows // 4, rows):
        with make_world(count, side, capacity) as world:
            ours = _seconds(lambda world=world: next(world.loader()), repeats)
            plain = _seconds(partial(lambda world: next(iter(world.plain())), world), repeats)
        result[f"{count}_rows"] = {"loader_s": ours, "plain_s": plain, "times_shorter": plain / ours}
    return result
