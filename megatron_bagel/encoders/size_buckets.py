"""Which images of a packed ViT input have equal length, so that attention runs once per length instead of once per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageGroups:
    """Runs of images of equal length after reordering.

    `groups` holds (number of images, tokens of each) in grouped order; `order` [n] takes packed tokens to grouped order
    and `inverse` [n] takes them back. Both are None where images of equal length are neighbours already.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    inverse: Tensor | None

    @property
    def run_lengths(self) -> list[int]:
        """Tokens of each group."""
        return [images * length for images, length in self.groups]


def group_by_length(seqlens: Sequence[int], device: torch.device) -> ImageGroups:
    """Groups images by their number of tokens; within a group images keep their order."""
    by_length: dict[int, list[int]] = {}
    for image, length in enumerate(seqlens):
        by_length.setdefault(length, []).append(image)
    groups = tuple((len(members), length) for length, members in by_length.items())
    sequence = [image for members in by_length.values() for image in members]
    if sequence == list(range(len(seqlens))):
        return ImageGroups(groups, None, None)
    starts = torch.tensor([0, *seqlens]).cumsum(0)
    order = torch.cat([torch.arange(starts[image], starts[image + 1]) for image in sequence])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return ImageGroups(groups, order.to(device), inverse.to(device))
