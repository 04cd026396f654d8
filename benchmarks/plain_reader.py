# SPDX-License-Identifier: Apache-2.0
"""A plain reader that follows the original's algorithm: parquet row groups and jsonl lines, one worker, greedy packing with overflow.

It hands out what the original's loader does with its default flags: a tensor per field and a dense mask per sample. What differs from the
original favours it here: row groups are not turned into data frames, a row's images are decoded once, choices are the keyed ones (so that
pixels can be compared), and packs are laid out by the library's own code.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.utils.data import IterableDataset

from megatron_bagel.data.loading.noise import raw_timesteps
from megatron_bagel.data.planner.planned_item import KeyedDraws
from megatron_bagel.data.planner.sample_plan import ConditionDropout, build_items, choose_items, drop_conditions, transform_of
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, TEXT, GroupConfig
from megatron_bagel.data.sources.records import RawSample, Record
from megatron_bagel.data.sources.rows import PARQUET_COLUMNS, SourceUnit, parse_edit, parse_t2i, parse_text, parse_vlm
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.data.transforms import decode_rgb, image_tensor, vit_patches
from megatron_bagel.layout.items import Mode, Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack, item_tokens

PREFER_BUFFER_SHARE, BUFFER = 16384 / 36864, 50


@dataclass
class PlainSample:
    """A sample with its pixels, by (image, kind)."""

    sample: Sample
    pixels: dict[tuple[int, str], torch.Tensor]
    tokens: int  # dropped conditions counted, as the original's packing does


@dataclass
class PlainPack:
    """A row of the original's loader: its index tensors by name, VAE images padded with zeros to the largest, a mask [length, length] of
    0 and -inf per sample. ``tokens`` and ``count`` of samples are for measuring."""

    tokens: int
    count: int
    tensors: dict[str, torch.Tensor]
    masks: list[torch.Tensor]
    padded_images: torch.Tensor
    vit_patches: torch.Tensor
    samples: list[PlainSample] | None = None


#: The fields of a pack that the original's batch holds as tensors.
FIELDS = (
    "text_ids", "text_positions", "position_ids", "vae_positions", "latent_shapes", "latent_position_ids", "vit_positions",
    "vit_position_ids", "vit_shapes", "ce_positions", "labels", "ce_weights", "mse_positions",
)  # fmt: skip


def dense_masks(pack: Pack) -> list[torch.Tensor]:
    """The mask of every sample, split by split."""
    masks, splits = [], iter(zip(pack.split_lens.tolist(), pack.split_modes.tolist(), strict=True))
    for length in pack.sample_lens.tolist():
        seen = torch.zeros(length, length, dtype=torch.bool)
        noised, start = [], 0
        while start < length:
            size, mode = next(splits)
            own = slice(start, start + size)
            seen[own, :start] = True
            seen[own, own] = torch.ones(size, size, dtype=torch.bool).tril() if mode == Mode.CAUSAL else True
            if mode == Mode.NOISE:
                noised.append(own)
            start += size
        for own in noised:
            inside = seen[own, own].clone()
            seen[:, own] = False
            seen[own, own] = inside
        masks.append(torch.zeros(length, length).masked_fill_(~seen, float("-inf")))
    return masks


class PlainReader(IterableDataset):
    """Endless packs of the groups' source files. ``keep`` hands the samples out too, for comparing pixels."""

    def __init__(
        self, groups: Sequence[GroupConfig], tokenizer: Tokenizer, spec: LayoutSpec, capacity: int, expected: int, seed: int,
        keep: bool = False,
    ) -> None:  # fmt: skip
        self.groups, self.tokenizer, self.spec, self.seed, self.keep = list(groups), tokenizer, spec, seed, keep
        self.capacity, self.expected = capacity, expected

    def __iter__(self) -> Iterator[PlainPack]:
        streams = {group.name: self._samples(group) for group in self.groups}
        draws, buffer = random.Random(self.seed), deque[PlainSample]()
        names, weights = [group.name for group in self.groups], [group.weight for group in self.groups]
        row: list[PlainSample] = []
        tokens = 0
        while True:
            if not row:
                row = [next(streams[group.name]) for group in self.groups if group.is_mandatory]
                tokens = sum(sample.tokens for sample in row)
            buffered = bool(buffer) and tokens < PREFER_BUFFER_SHARE * self.capacity
            sample = buffer.popleft() if buffered else next(streams[draws.choices(names, weights)[0]])
            if tokens + sample.tokens > self.capacity:
                if len(buffer) < BUFFER and not buffered:
                    buffer.append(sample)
                    continue
                yield self._packed(row)
                row, tokens = [], 0
                continue
            row.append(sample)
            tokens += sample.tokens
            if tokens >= self.expected:
                yield self._packed(row)
                row, tokens = [], 0

    def _packed(self, row: list[PlainSample]) -> PlainPack:
        pack = build_pack([each.sample for each in row], self.spec)
        images = [(image.kind, row[image.sample].pixels[image.image, image.kind]) for image in pack.images]
        vae = [pixels for kind, pixels in images if kind == "vae"]
        patches = [vit_patches(pixels, self.spec.vit_patch) for kind, pixels in images if kind == "vit"]
        height, width = (max((pixels.shape[side] for pixels in vae), default=0) for side in (1, 2))
        padded = torch.zeros(len(vae), 3, height, width)
        for place, pixels in zip(padded, vae, strict=True):
            place[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        tensors = {name: torch.from_numpy(getattr(pack, name)) for name in FIELDS}
        tensors["timesteps"] = torch.from_numpy(raw_timesteps(pack, self.seed))
        patched = torch.cat(patches) if patches else torch.zeros(0)
        counts = pack.sequence_length, len(row)
        return PlainPack(*counts, tensors, dense_masks(pack), padded, patched, row if self.keep else None)

    def _samples(self, group: GroupConfig) -> Iterator[PlainSample]:
        epoch = 0
        while True:
            for row, raw in _rows(group):
                yield self._sample(group, raw, row, epoch)
            epoch += 1

    def _sample(self, group: GroupConfig, raw: RawSample, row: int, epoch: int) -> PlainSample:
        decoded = [decode_rgb(data) for data in raw.images]
        sizes = np.array([image.size for image in decoded], dtype=np.int64).reshape(-1, 2)
        record = Record(group.name, np.zeros(len(raw.texts)), np.array(raw.structure), sizes[:, 0], sizes[:, 1])
        name = f"{group.name}/{group.datasets[0].name}"
        draws, dropout = KeyedDraws(self.seed, name, row, epoch), ConditionDropout()
        planned = drop_conditions(choose_items(record, draws), dropout, draws)
        items = build_items(planned, record, group, lambda text: np.asarray(self.tokenizer.encode(raw.texts[text]), dtype=np.int64))
        pixels = {
            (item.image, item.kind): image_tensor(decoded[item.image], transform_of(group, item.kind), item.width, item.height)
            for item in items if item.kind != "text" and not item.dropped
        }  # fmt: skip
        tokens = sum(item_tokens(replace(item, dropped=False), self.spec) for item in items)
        return PlainSample(Sample(name, row, epoch, items, group.name), pixels, tokens)


def _rows(group: GroupConfig) -> Iterator[tuple[int, RawSample]]:
    """(row number in the dataset, row) of the group's one dataset."""
    place = group.datasets[0].location
    if group.name in (T2I, EDIT):
        parse, row = parse_t2i if group.name == T2I else parse_edit, 0
        for path in sorted(Path(place.data_dir).glob("*.parquet")):
            file = pq.ParquetFile(path)
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=list(PARQUET_COLUMNS[group.name])).to_pydict()
                for values in zip(*table.values(), strict=True):
                    yield row, parse(*values)
                    row += 1
        return
    lines = Path(place.jsonl_path).read_text(encoding="utf-8").splitlines()
    unit = SourceUnit(group.name, place.jsonl_path, 0, 0, len(lines), image_dir=place.data_dir or "")
    for row, line in enumerate(lines):
        content = json.loads(line)
        yield row, parse_text(content) if group.name == TEXT else parse_vlm(content, unit, row)
