# SPDX-License-Identifier: Apache-2.0
"""Which images of a packed ViT input have equal length, so that attention runs once per length instead of once per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_bagel.platform.device import to_device


@dataclass(frozen=True)
class SizeBuckets:
    """Buckets of images of equal length, and the token order that puts each bucket's images side by side.

    ``buckets`` holds (number of images, tokens of each) in bucket order. ``order`` [n] takes packed tokens to bucket order
    and ``inverse`` [n] takes them back. Both are None if images of equal length already are neighbours.
    """

    buckets: tuple[tuple[int, int], ...]
    order: Tensor | None
    inverse: Tensor | None

    @property
    def run_lengths(self) -> list[int]:
        """Return the number of tokens of each bucket."""
        return [images * length for images, length in self.buckets]


def bucket_by_length(seqlens: Sequence[int], device: torch.device) -> SizeBuckets:
    """Put images with the same number of tokens into one bucket; within a bucket images keep their order."""
    by_length: dict[int, list[int]] = {}
    for image, length in enumerate(seqlens):
        by_length.setdefault(length, []).append(image)
    buckets = tuple((len(members), length) for length, members in by_length.items())
    sequence = [image for members in by_length.values() for image in members]
    if sequence == list(range(len(seqlens))):
        return SizeBuckets(buckets, None, None)
    starts = list(accumulate(seqlens, initial=0))
    order = torch.cat([torch.arange(starts[image], starts[image + 1]) for image in sequence])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return SizeBuckets(buckets, to_device(order, device), to_device(inverse, device))
