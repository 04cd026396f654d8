# SPDX-License-Identifier: Apache-2.0
"""Which rank of a model replica reads, decodes and encodes which image of a step: integers, the same on every rank.

A picture that a sample shows more than once (to the ViT and to the autoencoder, or noised and clean) stays on one rank, so that each
replica reads it once.
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
    """The properties of an image that its assignment needs."""

    @property
    def kind(self) -> str:
        """Return its encoder, "vit" or "vae"."""

    @property
    def sample(self) -> int:
        """Return the number of its sample in the pack."""

    @property
    def image(self) -> int:
        """Return the number of the picture in the sample."""

    @property
    def tokens(self) -> int:
        """Return its number of tokens, without border tokens."""


@dataclass(frozen=True)
class PlannedImage:
    """An ``EncodedImage`` known from its sample alone, before a pack is laid out."""

    kind: str
    sample: int
    image: int
    tokens: int


def planned_images(samples: Sequence[Sample], spec: LayoutSpec) -> list[PlannedImage]:
    """Return the images of a pack of ``samples``, in the order of ``Pack.images``."""
    images = []
    for number, sample in enumerate(samples):
        for item in sample.items:
            if item.kind != "text" and not item.dropped:
                rows, columns = item_grid(item, spec)
                images.append(PlannedImage(item.kind, number, item.image, rows * columns))
    return images


@dataclass(frozen=True)
class EncoderCosts:
    """Work of encoding an image, in units of one token's work in the decoder's matrix products (``CostModel``).

    ``vit_token`` counts per token and ``vit_pair`` per (query, key) pair of the vision tower; ``vae_token`` counts per latent token of
    the frozen autoencoder.
    """

    vit_token: float
    vit_pair: float
    vae_token: float

    @classmethod
    def of(cls, arch: BagelArch, frozen_vit: bool = False) -> EncoderCosts:
        """Return a model's costs by its floating-point operations. A frozen tower has no backward pass, which is two thirds of the work."""
        base, passes = CostModel.of(arch), 1 / 3 if frozen_vit else 1.0
        pair = 0.0
        if arch.vit is not None:
            # A pair takes 4 * hidden operations per layer, a token 2 * (4 * hidden^2 + 2 * hidden * intermediate).
            pair = base.vit_token * 2 / (4 * arch.vit.hidden_size + 2 * arch.vit.intermediate_size)
        return cls(base.vit_token * passes, pair * passes, base.vae_token)

    def image(self, image: EncodedImage) -> float:
        """Return the cost of encoding one image."""
        if image.kind == "vae":
            return self.vae_token * image.tokens
        return image.tokens * (self.vit_token + self.vit_pair * image.tokens)


def assign_images(packs: Sequence[Sequence[EncodedImage]], ranks: int, costs: EncoderCosts) -> list[np.ndarray]:
    """Assign the images of a replica's packs of one step to ranks.

    The most expensive picture goes first, each to the rank with the least work so far (Graham's longest-processing-time rule).
    Ties go to the earlier picture and the lower rank.

    Returns:
        The owner of every image, int64 [images] per pack, from 0 to ``ranks`` - 1.
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
    """A rank among the ``ranks`` of its replica that encode."""

    rank: int
    ranks: int
    costs: EncoderCosts

    def owners(self, packs: Sequence[Sequence[EncodedImage]]) -> list[np.ndarray]:
        """Return the owners of the images of ``packs`` (``assign_images``)."""
        return assign_images(packs, self.ranks, self.costs)
