"""Which rank of a model replica reads, decodes and encodes which image of a step: integers, the same on every rank.

A picture that a sample shows more than once (to the ViT and to the autoencoder, or noised and clean) stays on one rank, so that it
is read once per replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_bagel.common.assignment import longest_first
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.data.planner.cost_model import CostModel
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import LayoutSpec, item_grid


class EncodedImage(Protocol):
    """What dealing needs of an image: its encoder ("vit" or "vae"), the sample of its pack, which picture of that, its tokens."""

    kind: str
    sample: int
    image: int
    tokens: int


@dataclass(frozen=True)
class PlannedImage:
    """An `EncodedImage` known from its sample alone, before a pack is laid out."""

    kind: str
    sample: int
    image: int
    tokens: int


def planned_images(samples: Sequence[Sample], spec: LayoutSpec) -> list[PlannedImage]:
    """The images of a pack of ``samples``, in the order of `Pack.images`."""
    found = []
    for number, sample in enumerate(samples):
        for item in sample.items:
            if item.kind != "text" and not item.dropped:
                rows, columns = item_grid(item, spec)
                found.append(PlannedImage(item.kind, number, item.image, rows * columns))
    return found


@dataclass(frozen=True)
class EncoderCosts:
    """Work of encoding an image, in units of one token's work in the decoder's matrix products (`CostModel`).

    ``vit_token`` per token and ``vit_pair`` per (query, key) pair of the vision tower; ``vae_token`` per latent token of the frozen
    autoencoder.
    """

    vit_token: float
    vit_pair: float
    vae_token: float

    @classmethod
    def of(cls, arch: BagelArch, frozen_vit: bool = False) -> EncoderCosts:
        """Costs of a model by its floating-point operations. A frozen tower has no backward pass, twice the work of the forward."""
        base, passes = CostModel.of(arch), 1 / 3 if frozen_vit else 1.0
        pair = 0.0
        if arch.vit is not None:
            # A pair takes 4 * hidden operations per layer, a token 2 * (4 * hidden^2 + 2 * hidden * intermediate).
            pair = base.vit_token * 2 / (4 * arch.vit.hidden_size + 2 * arch.vit.intermediate_size)
        return cls(base.vit_token * passes, pair * passes, base.vae_token)

    def image(self, image: EncodedImage) -> float:
        """Cost of one encoding."""
        if image.kind == "vae":
            return self.vae_token * image.tokens
        return image.tokens * (self.vit_token + self.vit_pair * image.tokens)


def assign_images(packs: Sequence[Sequence[EncodedImage]], ranks: int, costs: EncoderCosts) -> list[np.ndarray]:
    """Owner of every image of a replica's ``packs`` of one step, int64 [images] per pack, from 0 to ``ranks`` - 1.

    The costliest picture goes first, each to the rank with the least work so far (Graham's longest-processing-time rule); ties go to
    the earlier picture and the lower rank.
    """
    work: dict[tuple[int, int, int], float] = {}
    for number, images in enumerate(packs):
        for image in images:
            key = (number, image.sample, image.image)
            work[key] = work.get(key, 0.0) + costs.image(image)
    keys = sorted(work)
    owners = dict(zip(keys, longest_first([work[key] for key in keys], ranks), strict=True))
    return [
        np.array([owners[number, image.sample, image.image] for image in images], dtype=np.int64) for number, images in enumerate(packs)
    ]


@dataclass(frozen=True)
class EncodingShare:
    """The place of a rank among the ``ranks`` of its replica that encode."""

    rank: int
    ranks: int
    costs: EncoderCosts

    def owners(self, packs: Sequence[Sequence[EncodedImage]]) -> list[np.ndarray]:
        """`assign_images` to these ranks."""
        return assign_images(packs, self.ranks, self.costs)
