# SPDX-License-Identifier: Apache-2.0
"""The image encoder on all ranks of a replica: each rank encodes its share of the images and sends features to their readers.

ViT features go to the ranks of the first pipeline stage, latents to those of the first and the last. The gradient of a ViT feature
returns to the rank that encoded it, so that the tower is data-parallel over all ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.data.loading.encoder_assignment import EncodingShare
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.transforms import RawImage, RawPatches
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.cached_latents import CachedPosterior
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings, patch_values
from megatron_bagel.encoders.tower_pass import TowerImage
from megatron_bagel.layout.pack import PackImage
from megatron_bagel.parallel.replica import Replica, return_rows, send_rows
from megatron_bagel.platform.device import to_device

_Pixels = TypeVar("_Pixels", bound=torch.Tensor | RawImage | RawPatches)


@dataclass(frozen=True)
class _Route:
    """The order in which the rows of one kind of image arrive: ``counts`` rows of each rank, in rank order.

    ``rows`` [n] are the arriving rows in sequence order, pack after pack.
    """

    counts: list[int]
    rows: torch.Tensor


def _route(images: Sequence[PackImage], owners: np.ndarray, ranks: int) -> _Route:
    tokens = np.array([image.tokens for image in images], dtype=np.int64)
    counts = np.bincount(owners, weights=tokens, minlength=ranks).astype(np.int64)
    starts = np.cumsum(counts) - counts
    rows = []
    for size, owner in zip(tokens, owners, strict=True):
        rows.append(np.arange(starts[owner], starts[owner] + size))
        starts[owner] += size
    return _Route(counts.tolist(), torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)))


class ShardedImageEncoder(ImageEncoder):
    """An ``ImageEncoder`` for a replica of several ranks. All of them have a tower and an autoencoder and call it together."""

    def __init__(
        self,
        arch: BagelArch,
        tower: torch.nn.Module | None,
        autoencoder: AutoEncoder | CachedPosterior | None,
        settings: ImageEncoderSettings,
        replica: Replica,
        share: EncodingShare,
    ) -> None:
        super().__init__(arch, tower, autoencoder, settings)
        self.replica, self.share = replica, share
        self._vit_route: _Route | None = None
        self._no_gradient: torch.Tensor | None = None

    def backward(self) -> None:
        """Return gradients to the ranks that encoded and send them through their towers. Collective over the replica."""
        leaf, route, gradient = self._leaf, self._vit_route, self._no_gradient
        self._leaf = self._vit_route = self._no_gradient = None
        if route is None or gradient is None:
            return
        if self.replica.rank in self.replica.first_stage_leads:
            # Tensor-parallel ranks have equal gradients, so only the first of them sends its gradient.
            gradient = gradient.new_zeros((sum(route.counts), gradient.shape[1]))
            if leaf is not None and leaf.grad is not None:
                gradient[to_device(route.rows, gradient.device)] = leaf.grad
        self._tower_pass.backward(return_rows(gradient, route.counts, self.replica.first_stage_leads, self.replica.group))

    def _vit_features(self, packs: Sequence[LoadedPack]) -> Sequence[torch.Tensor] | None:
        if self.tower is None or self.arch.vit is None:
            return None
        owners = self._owners(packs)
        route = self._route(packs, owners, "vit")
        local_features = self._tower_pass.encode(self.tower, self._tower_images(packs, owners), patch_values(self.arch.vit))
        received = send_rows(local_features, route.counts, self.replica.first_stage_ranks, self.replica.group)
        if self._tower_pass.waits_for_gradient:
            # Every rank runs the tower's backward pass, even without images, because its reductions are collective.
            self._vit_route, self._no_gradient = route, local_features.new_zeros((0, local_features.shape[1]))
        if self.replica.rank not in self.replica.first_stage_ranks:
            return None
        features = received[to_device(route.rows, received.device)]
        if self._tower_pass.waits_for_gradient:
            self._leaf = features.requires_grad_()
        return torch.split(features, [len(loaded.pack.vit_positions) for loaded in packs])

    def _tower_images(self, packs: Sequence[LoadedPack], owners: Sequence[np.ndarray]) -> list[TowerImage]:
        """Return the ViT images that this rank encodes."""
        images = []
        for loaded, ranks in zip(packs, owners, strict=True):
            pack = loaded.pack
            image_ends = np.cumsum([image.tokens for image in pack.images_of("vit")])
            for number, image, pixels in self._local_images(loaded, ranks, "vit", loaded.vit_images()):
                ids = pack.vit_position_ids[image_ends[number] - image.tokens : image_ends[number]]
                images.append(TowerImage(pixels, torch.from_numpy(ids)))
        return images

    @torch.no_grad()
    def _latents(self, packs: Sequence[LoadedPack]) -> Sequence[torch.Tensor] | None:
        if self.autoencoder is None:
            return None
        route = self._route(packs, self._owners(packs), "vae")
        local_latents = torch.cat(self._own_latents(self.autoencoder, packs))
        received = send_rows(local_latents, route.counts, self.replica.boundary_ranks, self.replica.group)
        if self.replica.rank not in self.replica.boundary_ranks:
            return None
        return torch.split(received[to_device(route.rows, received.device)], [len(loaded.pack.vae_positions) for loaded in packs])

    def _encode_own(self, autoencoder: AutoEncoder | CachedPosterior, packs: Sequence[LoadedPack]) -> list[torch.Tensor]:
        latents = []
        for loaded, ranks in zip(packs, self._owners(packs), strict=True):
            local_images = list(self._local_images(loaded, ranks, "vae", loaded.vae_images()))
            images, pixels = [image for _, image, _ in local_images], [pixels for _, _, pixels in local_images]
            latents.append(self._encoded(autoencoder, loaded, images, pixels))
        return latents

    def _owners(self, packs: Sequence[LoadedPack]) -> list[np.ndarray]:
        return self.share.owners([loaded.pack.images for loaded in packs])

    def _route(self, packs: Sequence[LoadedPack], owners: Sequence[np.ndarray], kind: str) -> _Route:
        images = [image for loaded in packs for image in loaded.pack.images]
        numbers = [number for number, image in enumerate(images) if image.kind == kind]
        return _route([images[number] for number in numbers], np.concatenate(owners)[numbers], self.replica.size)

    def _local_images(
        self, loaded: LoadedPack, owners: np.ndarray, kind: str, images_read: Sequence[_Pixels]
    ) -> Iterator[tuple[int, PackImage, _Pixels]]:
        """Yield the number among the pack's images of ``kind``, the image and the pixels of each that this rank encodes."""
        image_owners = [owner for owner, image in zip(owners, loaded.pack.images, strict=True) if image.kind == kind]
        decoded_images = iter(images_read)
        for number, (image, is_read) in enumerate(zip(loaded.pack.images_of(kind), loaded.read_mask(kind), strict=True)):
            pixels = next(decoded_images) if is_read else None
            if image_owners[number] != self.replica.rank:
                continue
            if pixels is None:
                raise ValueError(f"pack {loaded.plan.number}: image {image.image} of sample {image.sample} was not read by its encoder")
            yield number, image, pixels
