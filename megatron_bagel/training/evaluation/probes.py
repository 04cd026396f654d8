"""The fixed prompts that a run is watched with: held-out samples cut down to what is given and what is to be made.

A probe is a sample of the run's own data, so it has the sizes, the wording and the order of items the model is trained on, and its
truth is known: the picture or the answer that the data holds.
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
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, sample_tokens
from megatron_bagel.model.batch import Features


@dataclass(frozen=True)
class Probe:
    """One fixed prompt: the items that are given, in order, and the item to be made. ``source`` and ``index`` say where it is from."""

    name: str
    group: str
    source: int
    index: int
    sample: Sample
    given: tuple[Item, ...]
    wanted: Item

    @classmethod
    def of(cls, sample: Sample, source: int, index: int) -> Probe | None:
        """Up to the first item with a loss; None for a sample without any, and for one that begins with it: plain text."""
        first = next((place for place, item in enumerate(sample.items) if item.loss), None)
        given = tuple(item for item in sample.items[:first] if not item.dropped)
        if first is None or not given:
            return None
        name = f"{sample.dataset} {sample.index}"
        return cls(name, sample.group or sample.dataset, source, index, sample, given, sample.items[first])

    @property
    def draws(self) -> bool:
        """Whether a picture is to be made, rather than a text."""
        return self.wanted.kind == "vae"

    def prompt(self, decode: Callable[[Sequence[int]], str]) -> str:
        """The last text given, readable; empty when there is none."""
        texts = [item.token_ids for item in self.given if item.kind == "text"]
        return decode([int(token) for token in texts[-1]]) if texts else ""

    def views(self) -> list[Sample]:
        """What guidance compares, as samples that end with the picture: everything given, all before the last text, texts alone."""
        last = max((place for place, item in enumerate(self.given) if item.kind == "text"), default=len(self.given))
        kept = (self.given, self.given[:last], tuple(item for item in self.given if item.kind == "text"))
        return [replace(self.sample, items=(*items, self.wanted)) for items in kept]

    def answering(self, length: int, fill: int) -> Sample:
        """What is given, and room for an answer of ``length`` tokens, which hold ``fill`` until they are written."""
        blank = Item("text", loss=True, ids=np.full(length, fill, dtype=np.int64))
        return replace(self.sample, items=(*self.given, blank))


@dataclass(frozen=True)
class EncodedProbe:
    """A probe with the features of its images: rows by (kind, image number). ``vit`` rows are missing where no stage reads them."""

    probe: Probe
    rows: dict[tuple[str, int], Tensor]


def in_packs(samples: Sequence[Sample], spec: LayoutSpec, capacity: int) -> list[list[int]]:
    """Numbers of the samples of each pack, in order, as many as fit. Raises ValueError naming a sample that does not."""
    packs: list[list[int]] = []
    room = 0
    for number, sample in enumerate(samples):
        tokens = sample_tokens(sample, spec)
        if tokens > capacity:
            raise ValueError(f"{sample.dataset} {sample.index} takes {tokens} tokens to be made; raise --max_num_tokens above {capacity}")
        if not packs or tokens > room:
            packs.append([])
            room = capacity
        packs[-1].append(number)
        room -= tokens
    return packs


def read_probes(probes: Sequence[Probe], reader: PackReader, capacity: int) -> Iterator[tuple[list[Probe], LoadedPack]]:
    """Packs of the probes' whole samples with their pixels, for the encoders."""
    for number, members in enumerate(in_packs([probe.sample for probe in probes], reader.spec, capacity)):
        chosen = [probes[member] for member in members]
        samples = tuple((probe.source, probe.index, 0) for probe in chosen)
        tokens = sum(sample_tokens(probe.sample, reader.spec) for probe in chosen)
        yield chosen, reader[PackPlan(number, samples, tokens, 0.0)]


def encoded(probes: Sequence[Probe], pack: Pack, features: Features) -> list[EncodedProbe]:
    """Cut a pack's features into those of each probe's given images."""
    found = [EncodedProbe(probe, {}) for probe in probes]
    for kind, rows in (("vit", features.vit), ("vae", features.latents)):
        if rows is None:
            continue
        images = pack.images_of(kind)
        for image, part in zip(images, rows.split([image.tokens for image in images]), strict=True):
            if not image.noised:
                found[image.sample].rows[kind, image.image] = part.detach()
    return found


def condition_features(pack: Pack, members: Sequence[EncodedProbe], channels: int, device: torch.device | str) -> Features:
    """Features of a pack of views or answers, ``members`` being the probe of each of its samples; pictures to be made are zeros."""
    vit = [members[image.sample].rows.get(("vit", image.image)) for image in pack.images_of("vit")]
    whole = [part for part in vit if part is not None]
    latents = [
        torch.zeros(image.tokens, channels, device=device) if image.noised else members[image.sample].rows["vae", image.image]
        for image in pack.images_of("vae")
    ]
    rows = torch.cat(latents) if latents else torch.zeros(0, channels, device=device)
    times = torch.zeros(len(rows), device=device)
    return Features(torch.cat(whole) if whole and len(whole) == len(vit) else None, rows, rows, times)
