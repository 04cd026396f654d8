"""Turns plans into packs with pixels: worker processes read, decode and transform ahead of the training loop.

A worker receives a finished plan and draws only by key, so the number of workers changes only the speed. The plans come from a planner
in the training process. The saved position is that of the packs handed out, not of the packs the workers are reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.loading.decode_threads import DecodeThreads
from megatron_bagel.data.loading.encoder_assignment import EncodingShare, planned_images
from megatron_bagel.data.loading.noise import raw_timesteps
from megatron_bagel.data.loading.reading_process import (
    POLL_SECONDS,
    STOP_PATIENCE,
    SendingReader,
    next_record,
    start_reading_process,
)
from megatron_bagel.data.loading.replacement import SiblingSource, replaced_plan
from megatron_bagel.data.planner.assign import PackPlan, assign_packs
from megatron_bagel.data.planner.planner import Planner
from megatron_bagel.data.transforms import vit_patches
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, PackImage, build_pack
from megatron_bagel.platform.launch.child_processes import reading_context
from megatron_bagel.platform.launch.signals import StopRequest

_MIN_THREADED_PIXELS = 128 * 128  # average pixels of a pack's pictures from which decoding uses threads


class ReadableSource(SiblingSource, Protocol):
    """A source whose samples can be planned and read. It must be picklable if workers are spawned."""

    def datasets(self) -> dict[str, range]:
        """Return the name of each dataset and the source's indexes of its first pass."""
        ...

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the plan of one sample, with its token ids."""
        ...

    def pixels(self, index: int, image: PackImage) -> torch.Tensor:
        """Return one image of a sample, float32 of ``stored_shape``, on any thread. Raises ValueError if it cannot be decoded."""
        ...


def stored_shape(image: PackImage, posterior: AutoencoderArch | None) -> tuple[int, int, int]:
    """Return the shape of what a source returns for an image.

    It is that of the transformed pixels, [3, height, width]. For a VAE image of a run with a latent cache it is that of mean and log
    variance of the autoencoder ``posterior``, [2 * z, height / downsample, width / downsample].
    """
    if posterior is None or image.kind != "vae":
        return 3, image.height, image.width
    return 2 * posterior.z_channels, image.height // posterior.downsample, image.width // posterior.downsample


@dataclass
class LoadedPack:
    """A pack with its pixels.

    Images of a kind share one buffer, because a tensor per image would cost a file handle each on its way from a worker.

    ``vit_patches`` [n_vit, patch * patch * 3] is in sequence order, ``vae_buffer`` holds the VAE images one after the other, and
    ``raw_timesteps`` float32 [VAE images] is -inf for clean ones. With a latent cache, VAE images are posteriors of the autoencoder
    ``posterior`` (``stored_shape``). ``is_read`` bool [images] marks the pack's images that were read (default: all); pixels of the
    others are absent. ``failures`` are the positions in the pack of samples that could not be read, with the reasons. Such a pack
    cannot be trained on until ``PackLoader.replaced`` has replaced these samples.
    """

    plan: PackPlan
    pack: Pack
    vit_patches: torch.Tensor
    vae_buffer: torch.Tensor
    raw_timesteps: np.ndarray
    posterior: AutoencoderArch | None = None
    is_read: np.ndarray | None = None
    failures: tuple[tuple[int, str], ...] = ()

    def read_mask(self, kind: str) -> list[bool]:
        """Return for each of the pack's images of one kind whether it was read."""
        is_read = np.ones(len(self.pack.images), dtype=bool) if self.is_read is None else self.is_read
        return [bool(is_image_read) for image, is_image_read in zip(self.pack.images, is_read, strict=True) if image.kind == kind]

    def _read(self, kind: str) -> list[PackImage]:
        return list(compress(self.pack.images_of(kind), self.read_mask(kind)))

    def vit_images(self) -> Sequence[torch.Tensor]:
        """Return views [tokens, patch * patch * 3] of the ViT images that were read, in sequence order."""
        return torch.split(self.vit_patches, [image.tokens for image in self._read("vit")])

    def vae_images(self) -> list[torch.Tensor]:
        """Return views of the VAE images that were read, each of its ``stored_shape``, in sequence order."""
        shapes = [stored_shape(image, self.posterior) for image in self._read("vae")]
        pieces = torch.split(self.vae_buffer, [math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@dataclass(frozen=True)
class StepBatch:
    """The data of one replica in one step: its ``packs`` (microbatches), and the ``plans`` of the global batch."""

    packs: list[LoadedPack]
    plans: list[PackPlan]


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
        patches = [vit_patches(decoded[number][0], self.spec.vit_patch) for number, image in enumerate(images) if image.kind == "vit"]
        pixels = [decoded[number][0].reshape(-1) for number, image in enumerate(images) if image.kind == "vae"]
        return LoadedPack(
            plan=plan,
            pack=pack,
            vit_patches=torch.cat(patches) if patches else torch.zeros(0, 3 * self.spec.vit_patch**2),
            vae_buffer=torch.cat(pixels) if pixels else torch.zeros(0),
            raw_timesteps=raw_timesteps(pack, self.seed),
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

    def _read(self, plan: PackPlan, images: Sequence[PackImage]) -> list[tuple[torch.Tensor, str]]:
        """Return the pixels of every image with an empty string, or zeros with the reason of the failure."""
        pictures: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            pictures.setdefault((image.sample, image.image), []).append(number)

        def read(numbers: list[int]) -> list[tuple[torch.Tensor, str]]:
            results = []
            for number in numbers:  # picture by picture, because a source caches the last one it decoded
                try:
                    results.append((self._pixels(plan, images[number]), ""))
                except UnreadableError as error:
                    results.append((torch.zeros(stored_shape(images[number], self.posterior)), str(error)))
            return results

        jobs = list(pictures.values())
        area = sum(images[numbers[0]].height * images[numbers[0]].width for numbers in jobs)
        # Handing a small picture to another thread would cost more than decoding it.
        job_results = self.threads.map(read, jobs) if area >= _MIN_THREADED_PIXELS * len(jobs) else map(read, jobs)
        results = dict(zip(chain.from_iterable(jobs), chain.from_iterable(job_results), strict=True))
        return [results[number] for number in range(len(images))]

    def _pixels(self, plan: PackPlan, image: PackImage) -> torch.Tensor:
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


def _check_length(plan: PackPlan, pack: Pack) -> None:
    if pack.sequence_length != plan.tokens:
        raise ValueError(
            f"pack {plan.number} was planned with {plan.tokens} tokens and has {pack.sequence_length}; "
            "the index changed during the run, so build it again or restore the output of data_tools/build_index.py"
        )


class PackLoader:
    """Endless iterator of ``StepBatch`` for one data-parallel replica, starting at the planner's loaded state."""

    def __init__(
        self, planner: Planner, reader: PackReader, replica: int = 0, replicas: int = 1, num_workers: int = 0, prefetch_factor: int = 2,
        sizes: BatchSizes | None = None,
    ) -> None:  # fmt: skip
        """Prepare the loader of replica ``replica`` of ``replicas``.

        Each of ``num_workers`` processes reads ``prefetch_factor`` packs ahead; 0 workers read in this process. ``sizes`` of the global
        batches default to the planner's constant size.
        """
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} of {replicas} does not exist")
        self.planner, self.reader = planner, reader
        self.replica, self.replicas = replica, replicas
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.consumed_packs = planner.packs_made
        self.sizes = sizes or BatchSizes.of(planner.config.global_batch_size, [])
        for size in self.sizes.steps:
            assign_packs([PackPlan(number, (), 0, 0.0) for number in range(size)], replicas)  # refuses uneven sizes early
        self._batches: list[list[PackPlan]] = []  # planned but not yet handed out
        self._loaded: Iterator[Any] | None = None  # packs, or what reading processes send in their place
        self._stop_request: StopRequest | None = None
        self._patience = STOP_PATIENCE

    def give_up_after(self, stop_request: StopRequest, patience: float | None = None) -> None:
        """Wait for reading processes at most ``patience`` seconds once ``stop_request`` has a signal."""
        self._stop_request, self._patience = stop_request, STOP_PATIENCE if patience is None else patience

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        packs_per_replica = self.sizes.at(self.consumed_packs) // self.replicas
        try:
            packs = [self._next_pack() for _ in range(packs_per_replica)]
        except Exception:
            self.close()  # the error keeps this object alive, and with it the processes
            raise
        plans = self._batches.pop(0)
        self.consumed_packs += len(plans)
        return StepBatch(packs, plans)

    def replaced(self, batch: StepBatch, failed: Sequence[tuple[int, int]]) -> StepBatch:
        """Return ``batch`` with other samples at the positions ``failed``, (pack of the batch, sample of the pack).

        They are read in this process. Raises ValueError if a dataset has no sample for a position.
        """
        positions: dict[int, list[int]] = {}
        for pack, sample in failed:
            positions.setdefault(pack, []).append(sample)
        plans = [
            replaced_plan(pack.plan, positions[number], self.reader.sources, self.planner.config) if number in positions else pack.plan
            for number, pack in enumerate(batch.packs)
        ]
        # All images of a step decide who reads which, so where ranks share the images the other packs are read again as well.
        reread = range(len(plans)) if self.reader.share is not None else positions
        packs = [self.reader[StepPlan(tuple(plans), number)] if number in reread else pack for number, pack in enumerate(batch.packs)]
        new_plans = {plan.number: plan for plan in plans}
        return StepBatch(packs, [new_plans.get(plan.number, plan) for plan in batch.plans])

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state after the packs handed out so far, regardless of what the workers have read."""
        return self.planner.state_at(self.consumed_packs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state; packs read ahead are discarded."""
        self.close()
        self.planner.load_state_dict(state)
        self.consumed_packs = self.planner.packs_made

    def _next_pack(self) -> LoadedPack:
        if self._loaded is None:
            self._loaded = self._start()
        return next_record(self._loaded, self._stop_request, self._patience) if self.num_workers else next(self._loaded)

    def _start(self) -> Iterator[Any]:
        sampler = _Plans(self)
        if not self.num_workers:
            return iter(DataLoader(self.reader, batch_size=None, sampler=sampler))
        reader: SendingReader[StepPlan, LoadedPack] = SendingReader(self.reader.__getitem__)
        try:
            return iter(
                DataLoader(
                    reader,
                    batch_size=None,
                    sampler=sampler,
                    num_workers=self.num_workers,
                    prefetch_factor=self.prefetch_factor,
                    worker_init_fn=start_reading_process,
                    multiprocessing_context=reading_context(),
                    timeout=POLL_SECONDS,
                )
            )
        except OSError as error:
            raise ValueError(
                f"{self.num_workers} processes that read data cannot be started: {error}. If /dev/shm is full or missing, make room there "
                "(docker run --ipc host, or --shm-size); --num_workers 0 reads in the training process"
            ) from error

    def close(self) -> None:
        """Stop the workers. Iterating again continues after the packs handed out."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self.num_workers:
            loaded._shutdown_workers()  # type: ignore[attr-defined]  # DataLoader has no public name for it
        self._batches.clear()

    def plan_next(self) -> list[PackPlan]:
        """Plan the next global batch after all planned ones, and return this replica's packs of it."""
        first_pack = self.consumed_packs + sum(map(len, self._batches))
        plans = self.planner.packs(first_pack, self.sizes.at(first_pack))
        self._batches.append(plans)
        return assign_packs(plans, self.replicas)[self.replica]


class _Plans:
    """Sampler over this replica's plans. The data loader draws from it whenever a worker is idle."""

    def __init__(self, loader: PackLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[StepPlan]:
        while True:
            packs = tuple(self.loader.plan_next())
            yield from (StepPlan(packs, number) for number in range(len(packs)))
