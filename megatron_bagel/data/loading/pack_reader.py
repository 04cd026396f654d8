# SPDX-License-Identifier: Apache-2.0
"""Reads planned packs: texts, pictures and transforms, in a worker process or in the training process.

A pack is a function of its plan and of keyed draws, so it does not matter which process reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.data.loading.decode_threads import DecodeThreads
from megatron_bagel.data.loading.encoder_assignment import EncodingShare, planned_images
from megatron_bagel.data.loading.loaded_pack import LoadedPack, stored_shape
from megatron_bagel.data.loading.noise import raw_timesteps
from megatron_bagel.data.loading.replacement import SiblingSource
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.transforms import RawImage, vit_patches
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, PackImage, build_pack

_MIN_THREADED_PIXELS = 128 * 128  # average pixels of a pack's pictures from which decoding uses threads


class ReadableSource(SiblingSource, Protocol):
    """A source whose samples can be planned and read. It must be picklable if workers are spawned."""

    def datasets(self) -> dict[str, range]:
        """Return the name of each dataset and the source's indexes of its first pass."""
        ...

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the plan of one sample, with its token ids."""
        ...

    def pixels(self, index: int, image: PackImage) -> torch.Tensor | RawImage:
        """Return one image of a sample on any thread: before its normalisation, or ready as float32 of ``stored_shape``.

        Raises ValueError if it cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class StepPlan:
    """Pack ``number`` of the ``packs`` of a replica in one step; all of them together decide which rank reads an image."""

    packs: tuple[PackPlan, ...]
    number: int


class UnreadableError(ValueError):
    """A text or an image whose bytes cannot be read or decoded; the message names its location."""


class PackReader(Dataset[LoadedPack]):
    """Reads planned packs; ``reader[plan]`` runs in a worker.

    A ``PackPlan`` is read completely, or raises UnreadableError. Of a ``StepPlan`` only the images of this rank's ``share`` are read,
    and samples that cannot be read become ``failures``.
    """

    def __init__(
        self, sources: Sequence[ReadableSource], spec: LayoutSpec, seed: int, posterior: AutoencoderArch | None = None,
        share: EncodingShare | None = None, decode_threads: int = 0,
    ) -> None:  # fmt: skip
        """Prepare to read packs.

        Args:
            sources: The dataset groups.
            spec: The settings of the layout.
            seed: Keys the timestep draws.
            posterior: The autoencoder of the latent cache from which the sources read VAE images, if any.
            share: This rank's share of the encoding if the ranks of the replica share it.
            decode_threads: The number of threads that decode large pictures.
        """
        self.sources, self.spec, self.seed, self.posterior, self.share = list(sources), spec, seed, posterior, share
        self.threads = DecodeThreads(decode_threads)
        self._owners_of_packs: tuple[tuple[PackPlan, ...], list[np.ndarray]] = ((), [])

    def __getitem__(self, request: PackPlan | StepPlan) -> LoadedPack:
        plan, is_read = (request, None) if isinstance(request, PackPlan) else (request.packs[request.number], self._read_mask(request))
        samples, failures = self._samples(plan)
        if failures and isinstance(request, PackPlan):
            raise UnreadableError(next(iter(failures.values())))
        pack = build_pack(samples, self.spec)
        if failures:  # the replacing pack reads the pictures
            no_pixels = torch.zeros(0), torch.zeros(0), np.zeros(0, dtype=np.float32)
            return LoadedPack(plan, pack, *no_pixels, is_read=np.zeros(len(pack.images), dtype=bool), failures=tuple(failures.items()))
        _check_length(plan, pack)
        images = pack.images if is_read is None else tuple(compress(pack.images, is_read))
        decoded = self._read(plan, images)
        for number, (_, reason) in enumerate(decoded):
            if reason and isinstance(request, PackPlan):
                raise UnreadableError(reason)
            if reason:
                failures.setdefault(images[number].sample, reason)
        by_kind = {kind: [decoded[n][0] for n, image in enumerate(images) if image.kind == kind] for kind in ("vit", "vae")}
        patches, pixels = [_patches(image, self.spec.vit_patch) for image in by_kind["vit"]], [_flat(image) for image in by_kind["vae"]]
        return LoadedPack(
            plan=plan,
            pack=pack,
            vit_patches=torch.cat(patches) if patches else torch.zeros(0, 3 * self.spec.vit_patch**2),
            vae_buffer=torch.cat(pixels) if pixels else torch.zeros(0),
            raw_timesteps=raw_timesteps(pack, self.seed),
            normalizations={k: [image.normalization for image in kind if isinstance(image, RawImage)] for k, kind in by_kind.items()},
            posterior=self.posterior,
            is_read=is_read,
            failures=tuple(sorted(failures.items())),
        )

    def layout(self, plan: PackPlan) -> Pack:
        """Return every integer of a planned pack, without a pixel."""
        pack = build_pack([self.sources[source].sample(index, epoch) for source, index, epoch in plan.samples], self.spec)
        _check_length(plan, pack)
        return pack

    def _samples(self, plan: PackPlan) -> tuple[list[Sample], dict[int, str]]:
        """Return the samples of a pack whose texts can be read, and the positions of the others with the reason."""
        samples, failures = [], {}
        for position, (source, index, epoch) in enumerate(plan.samples):
            try:
                samples.append(self.sources[source].sample(index, epoch))
            except (ValueError, OSError) as error:
                failures[position] = f"{self.sources[source].describe(index)} cannot be read: {error}"
        return samples, failures

    def _read_mask(self, request: StepPlan) -> np.ndarray | None:
        """Return which images of the pack this rank encodes; None means all of them."""
        if self.share is None:
            return None
        if self._owners_of_packs[0] != request.packs:
            images = [planned_images(self._samples(plan)[0], self.spec) for plan in request.packs]
            self._owners_of_packs = request.packs, self.share.owners(images)
        return self._owners_of_packs[1][request.number] == self.share.rank

    def _read(self, plan: PackPlan, images: Sequence[PackImage]) -> list[tuple[torch.Tensor | RawImage, str]]:
        """Return the pixels of every image with an empty string, or zeros with the reason of the failure."""
        pictures: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            pictures.setdefault((image.sample, image.image), []).append(number)

        def read(numbers: list[int]) -> list[tuple[torch.Tensor | RawImage, str]]:
            results: list[tuple[torch.Tensor | RawImage, str]] = []
            for number in numbers:  # picture by picture, because a source caches the last one it decoded
                try:
                    results.append((self._pixels(plan, images[number]), ""))
                except UnreadableError as error:
                    results.append((torch.zeros(stored_shape(images[number], self.posterior)), str(error)))  # nobody trains on it
            return results

        jobs = list(pictures.values())
        area = sum(images[numbers[0]].height * images[numbers[0]].width for numbers in jobs)
        # Handing a small picture to another thread would cost more than decoding it.
        job_results = self.threads.map(read, jobs) if area >= _MIN_THREADED_PIXELS * len(jobs) else map(read, jobs)
        results = dict(zip(chain.from_iterable(jobs), chain.from_iterable(job_results), strict=True))
        return [results[number] for number in range(len(images))]

    def _pixels(self, plan: PackPlan, image: PackImage) -> torch.Tensor | RawImage:
        source, index, _ = plan.samples[image.sample]
        try:
            pixels = self.sources[source].pixels(index, image)
        except (ValueError, OSError) as error:
            where = self.sources[source].describe(index)
            raise UnreadableError(f"image {image.image} of {where} cannot be read: {error}") from error
        if tuple(pixels.shape) != (planned := stored_shape(image, self.posterior)):
            raise ValueError(
                f"image {image.image} of {self.sources[source].describe(index)} has shape {tuple(pixels.shape)} after its transform, "
                f"but the plan says {planned}; the index was built from another file, so build it again"
            )
        return pixels


def _patches(image: torch.Tensor | RawImage, patch: int) -> torch.Tensor:
    return vit_patches(image.values.permute(2, 0, 1) if isinstance(image, RawImage) else image, patch)


def _flat(image: torch.Tensor | RawImage) -> torch.Tensor:
    return (image.values if isinstance(image, RawImage) else image).reshape(-1)


def _check_length(plan: PackPlan, pack: Pack) -> None:
    if pack.sequence_length != plan.tokens:
        raise ValueError(
            f"pack {plan.number} was planned with {plan.tokens} tokens and has {pack.sequence_length}; "
            "the index changed during the run, so build it again or restore the output of data_tools/build_index.py"
        )
