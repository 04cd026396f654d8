# SPDX-License-Identifier: Apache-2.0
"""Fixed prompts that show the progress of a run: held-out samples, divided into conditions and a target.

A probe is a sample of the run's own data, so it has the sizes, the wording and the order of items that the model is trained on. Its
truth is known: the picture or the answer in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.sources.dataset_config import INTERLEAVED
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, PackImage, sample_tokens
from megatron_bagel.model.batch import Features


@dataclass(frozen=True)
class Probe:
    """One fixed prompt: the items of ``sample`` that condition the model, in order, and the item that it must produce.

    ``source`` and ``index`` name the sample: the number of its dataset group and its index in the group.
    """

    name: str
    group: str
    source: int
    index: int
    sample: Sample
    conditions: tuple[Item, ...]
    target: Item

    @classmethod
    def of(cls, sample: Sample, source: int, index: int) -> Probe | None:
        """Make a probe whose target is the first item with a loss. Return None without such an item, or if no item precedes it."""
        target = next((index for index, item in enumerate(sample.items) if item.loss), None)
        conditions = _conditions(sample.items[:target])
        if target is None or not conditions:
            return None
        name = f"{sample.dataset} {sample.index}"
        return cls(name, sample.group or sample.dataset, source, index, sample, conditions, sample.items[target])

    @classmethod
    def each(cls, sample: Sample, source: int, index: int) -> list[Probe]:
        """Make the probes of a sample: of an interleaved one a probe for each text and picture with a loss, else the first one alone.

        A later item of an interleaved sample follows the true items before it, as in training: texts between their special tokens, and
        pictures clean.
        """
        first = cls.of(sample, source, index)
        if first is None or sample.group != INTERLEAVED:
            return [] if first is None else [first]
        probes = [first]
        start = next(number for number, item in enumerate(sample.items) if item is first.target)
        for number, target in enumerate(sample.items[start + 1 :], start + 1):
            if target.loss and target.split_start and target.split_end:
                conditions = _conditions(sample.items[:number])
                probes.append(replace(first, name=f"{first.name} item {number}", conditions=conditions, target=target))
        return probes

    @property
    def draws(self) -> bool:
        """Return whether the target is a picture rather than a text."""
        return self.target.kind == "vae"

    def prompt(self, decode: Callable[[Sequence[int]], str]) -> str:
        """Return the last text among the conditions, decoded; empty if there is none."""
        texts = [item.token_ids for item in self.conditions if item.kind == "text"]
        return decode([int(token) for token in texts[-1]]) if texts else ""

    def views(self) -> list[Sample]:
        """Return the three views that guidance compares, as samples that end with the target.

        They have all conditions, the conditions before the last text, and only the texts.
        """
        last_text = max((index for index, item in enumerate(self.conditions) if item.kind == "text"), default=len(self.conditions))
        texts = tuple(item for item in self.conditions if item.kind == "text")
        views = (self.conditions, self.conditions[:last_text], texts)
        return [replace(self.sample, items=(*items, self.target)) for items in views]

    def answering(self, length: int, fill: int) -> Sample:
        """Return a sample of the conditions and an answer of ``length`` tokens, all of them ``fill`` until they are predicted."""
        blank = Item("text", loss=True, ids=np.full(length, fill, dtype=np.int64))
        return replace(self.sample, items=(*self.conditions, blank))


def _conditions(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return the items that a later one sees, none of which has a loss of its own."""
    return tuple(
        replace(item, loss=False, special_token_label=None) if item.loss or item.special_token_label is not None else item
        for item in items
        if not item.dropped and not (item.kind == "vae" and item.loss)
    )


@dataclass(frozen=True)
class EncodedProbe:
    """A probe with the features of its images: rows by kind, image number and frame. Stages that do not read ``vit`` rows have none."""

    probe: Probe
    rows: dict[tuple[str, int, int | None], Tensor]


def in_packs(samples: Sequence[Sample], spec: LayoutSpec, capacity: int) -> list[list[int]]:
    """Assign samples to packs in order, as many as fit into each, and return the indexes of each pack's samples.

    Raises:
        ValueError: A sample is longer than ``capacity``; the text names it.
    """
    packs: list[list[int]] = []
    room = 0
    for number, sample in enumerate(samples):
        tokens = sample_tokens(sample, spec)
        if tokens > capacity:
            raise ValueError(
                f"{sample.dataset} {sample.index} needs {tokens} tokens for its evaluation; raise --max_num_tokens above {capacity}"
            )
        if not packs or tokens > room:
            packs.append([])
            room = capacity
        packs[-1].append(number)
        room -= tokens
    return packs


def read_probes(probes: Sequence[Probe], reader: PackReader, capacity: int) -> Iterator[tuple[list[Probe], LoadedPack]]:
    """Yield packs of the probes' complete samples with their pixels, for the encoders."""
    for number, members in enumerate(in_packs([probe.sample for probe in probes], reader.spec, capacity)):
        pack_probes = [probes[member] for member in members]
        samples = tuple((probe.source, probe.index, 0) for probe in pack_probes)
        tokens = sum(sample_tokens(probe.sample, reader.spec) for probe in pack_probes)
        yield pack_probes, reader[PackPlan(number, samples, tokens, 0.0)]


def encoded(probes: Sequence[Probe], pack: Pack, features: Features) -> list[EncodedProbe]:
    """Slice a pack's features into those of each probe's conditions."""
    encoded_probes = [EncodedProbe(probe, {}) for probe in probes]
    for kind, rows in (("vit", features.vit), ("vae", features.latents)):
        if rows is None:
            continue
        images = pack.images_of(kind)
        for image, part in zip(images, rows.split([image.tokens for image in images]), strict=True):
            if not image.noised:
                encoded_probes[image.sample].rows[_key(image)] = part.detach()
    return encoded_probes


def _key(image: PackImage) -> tuple[str, int, int | None]:
    return image.kind, image.image, image.frame


def condition_features(pack: Pack, members: Sequence[EncodedProbe], channels: int, device: torch.device | str) -> Features:
    """Return the features of a pack of views or answers. ``members`` are the probes of its samples; targets are zeros."""
    vit = [members[image.sample].rows.get(_key(image)) for image in pack.images_of("vit")]
    vit_rows = [part for part in vit if part is not None]
    latents = [
        torch.zeros(image.tokens, channels, device=device) if image.noised else members[image.sample].rows[_key(image)]
        for image in pack.images_of("vae")
    ]
    rows = torch.cat(latents) if latents else torch.zeros(0, channels, device=device)
    return Features(torch.cat(vit_rows) if vit_rows and len(vit_rows) == len(vit) else None, rows, rows, torch.zeros(len(rows)))
