"""From plans to packs with pixels: worker processes read, decode and transform ahead of the training loop.

A worker gets a finished plan and draws nothing that is not keyed, so the number of workers changes speed and nothing else. The
plans come from a planner in the training process itself; the position that is saved is that of the packs handed out, not of
those the workers are busy with.
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
from megatron_bagel.data.loading.replacement import SiblingSource, replaced_plan
from megatron_bagel.data.planner.assign import PackPlan, assign_packs
from megatron_bagel.data.planner.planner import Planner
from megatron_bagel.data.transforms import vit_patches
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, PackImage, build_pack
from megatron_bagel.platform.launch.signals import leave_signals_to_the_ranks

_WORTH_THREADS = 128 * 128  # pixels of a picture, on average over a pack


class ReadableSource(SiblingSource, Protocol):
    """A source whose samples can be read, not only planned. It must be picklable where workers are spawned."""

    def sample(self, index: int, epoch: int) -> Sample:
        """The plan of one sample, with its token ids."""
        ...

    def pixels(self, index: int, image: PackImage) -> torch.Tensor:
        """One image of a sample, float32 of `stored_shape`, on any thread. Raises ValueError when it cannot be decoded."""
        ...


def stored_shape(image: PackImage, posterior: AutoencoderArch | None) -> tuple[int, int, int]:
    """Shape of what a source gives for an image: its transformed pixels [3, height, width] or, for a VAE image of a run with a
    latent cache, the ``posterior`` of its autoencoder, mean and log variance [2 * z, height / downsample, width / downsample]."""
    if posterior is None or image.kind != "vae":
        return 3, image.height, image.width
    return 2 * posterior.z_channels, image.height // posterior.downsample, image.width // posterior.downsample


@dataclass
class LoadedPack:
    """A pack with its pixels. Images of a kind share one buffer: a tensor per image would cost a file handle each on its way
    from a worker.

    ``vit_patches`` [n_vit, patch * patch * 3] in sequence order; ``vae_buffer`` holds the VAE images one after the other;
    ``raw_timesteps`` float32 [VAE images], -inf for clean ones. With a latent cache ``posterior`` is the shape of its autoencoder,
    and VAE images are posteriors (`stored_shape`). ``held`` bool [images] says which of the pack's images were read (all by default);
    the pixels of the others are not there. ``failures`` are the places in the pack, with the reason, of samples that could not be
    read; such a pack is not fit for training, `PackLoader.replaced` mends it.
    """

    plan: PackPlan
    pack: Pack
    vit_patches: torch.Tensor
    vae_buffer: torch.Tensor
    raw_timesteps: np.ndarray
    posterior: AutoencoderArch | None = None
    held: np.ndarray | None = None
    failures: tuple[tuple[int, str], ...] = ()

    def held_of(self, kind: str) -> list[bool]:
        """Which of the pack's images of one kind were read."""
        held = np.ones(len(self.pack.images), dtype=bool) if self.held is None else self.held
        return [bool(here) for image, here in zip(self.pack.images, held, strict=True) if image.kind == kind]

    def _read(self, kind: str) -> list[PackImage]:
        return list(compress(self.pack.images_of(kind), self.held_of(kind)))

    def vit_images(self) -> Sequence[torch.Tensor]:
        """Views [tokens, patch * patch * 3] of the ViT images that were read, in sequence order."""
        return torch.split(self.vit_patches, [image.tokens for image in self._read("vit")])

    def vae_images(self) -> list[torch.Tensor]:
        """Views of the VAE images that were read, each of its `stored_shape`, in sequence order."""
        shapes = [stored_shape(image, self.posterior) for image in self._read("vae")]
        pieces = torch.split(self.vae_buffer, [math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@dataclass(frozen=True)
class StepBatch:
    """What one replica trains on in one step: its ``packs`` (microbatches), out of the global batch's ``plans``."""

    packs: list[LoadedPack]
    plans: list[PackPlan]


@dataclass(frozen=True)
class StepPlan:
    """Pack ``number`` of the ``packs`` that a replica trains on in one step: who reads an image depends on all of them."""

    packs: tuple[PackPlan, ...]
    number: int


class UnreadableError(ValueError):
    """A text or an image whose bytes cannot be read or decoded, in a message with its place."""


class PackReader(Dataset):
    """Reads planned packs; ``reader[plan]`` runs in a worker. A `PackPlan` is read whole or not at all (UnreadableError), of a
    `StepPlan` only the images of this rank's ``share``, and samples that cannot be read become ``failures``."""

    def __init__(
        self, sources: Sequence[ReadableSource], spec: LayoutSpec, seed: int, posterior: AutoencoderArch | None = None,
        share: EncodingShare | None = None, decode_threads: int = 0,
    ) -> None:  # fmt: skip
        """``seed`` names the timestep draws. ``posterior`` is given when the sources read VAE images from a latent cache, ``share``
        when the ranks of the replica share the encoding of its images. Large pictures are decoded on ``decode_threads``."""
        self.sources, self.spec, self.seed, self.posterior, self.share = list(sources), spec, seed, posterior, share
        self.threads = DecodeThreads(decode_threads)
        self._dealt: tuple[tuple[PackPlan, ...], list[np.ndarray]] = ((), [])

    def __getitem__(self, wanted: PackPlan | StepPlan) -> LoadedPack:
        plan, held = (wanted, None) if isinstance(wanted, PackPlan) else (wanted.packs[wanted.number], self._held(wanted))
        samples, failures = self._samples(plan)
        if failures and isinstance(wanted, PackPlan):
            raise UnreadableError(next(iter(failures.values())))
        pack = build_pack(samples, self.spec)
        if failures:  # pictures wait for the pack that takes its place
            nothing = torch.zeros(0), torch.zeros(0), np.zeros(0, dtype=np.float32)
            return LoadedPack(plan, pack, *nothing, held=np.zeros(len(pack.images), dtype=bool), failures=tuple(failures.items()))
        _check_length(plan, pack)
        images = pack.images if held is None else tuple(compress(pack.images, held))
        read = self._read(plan, images)
        for place, (_, reason) in enumerate(read):
            if reason and isinstance(wanted, PackPlan):
                raise UnreadableError(reason)
            if reason:
                failures.setdefault(images[place].sample, reason)
        patches = [vit_patches(read[place][0], self.spec.vit_patch) for place, image in enumerate(images) if image.kind == "vit"]
        pixels = [read[place][0].reshape(-1) for place, image in enumerate(images) if image.kind == "vae"]
        return LoadedPack(
            plan=plan,
            pack=pack,
            vit_patches=torch.cat(patches) if patches else torch.zeros(0, 3 * self.spec.vit_patch**2),
            vae_buffer=torch.cat(pixels) if pixels else torch.zeros(0),
            raw_timesteps=raw_timesteps(pack, self.seed),
            posterior=self.posterior,
            held=held,
            failures=tuple(sorted(failures.items())),
        )

    def layout(self, plan: PackPlan) -> Pack:
        """Every integer of a planned pack, without a pixel."""
        pack = build_pack([self.sources[source].sample(index, epoch) for source, index, epoch in plan.samples], self.spec)
        _check_length(plan, pack)
        return pack

    def _samples(self, plan: PackPlan) -> tuple[list[Sample], dict[int, str]]:
        """The samples of a pack whose texts can be read, and the places of the others with the reason."""
        samples, failures = [], {}
        for place, (source, index, epoch) in enumerate(plan.samples):
            try:
                samples.append(self.sources[source].sample(index, epoch))
            except (ValueError, OSError) as error:
                failures[place] = f"{self.sources[source].describe(index)} cannot be read: {error}"
        return samples, failures

    def _held(self, wanted: StepPlan) -> np.ndarray | None:
        """Which images of the pack this rank encodes; None for all of them."""
        if self.share is None:
            return None
        if self._dealt[0] != wanted.packs:
            images = [planned_images(self._samples(plan)[0], self.spec) for plan in wanted.packs]
            self._dealt = wanted.packs, self.share.owners(images)
        return self._dealt[1][wanted.number] == self.share.rank

    def _read(self, plan: PackPlan, images: Sequence[PackImage]) -> list[tuple[torch.Tensor, str]]:
        """Pixels of every image, or zeros and the reason why there are none."""
        pictures: dict[tuple[int, int], list[int]] = {}
        for place, image in enumerate(images):
            pictures.setdefault((image.sample, image.image), []).append(place)

        def read(places: list[int]) -> list[tuple[torch.Tensor, str]]:
            found = []
            for place in places:  # picture by picture: a source keeps the last one it decoded
                try:
                    found.append((self._pixels(plan, images[place]), ""))
                except UnreadableError as error:
                    found.append((torch.zeros(stored_shape(images[place], self.posterior)), str(error)))
            return found

        jobs = list(pictures.values())
        area = sum(images[places[0]].height * images[places[0]].width for places in jobs)
        # Handing a small picture to another thread costs more than decoding it.
        done = self.threads.map(read, jobs) if area >= _WORTH_THREADS * len(jobs) else map(read, jobs)
        found = dict(zip(chain.from_iterable(jobs), chain.from_iterable(done), strict=True))
        return [found[place] for place in range(len(images))]

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
                f"planned were {planned}; the index was built from another file: build it anew"
            )
        return pixels


def _check_length(plan: PackPlan, pack: Pack) -> None:
    if pack.sequence_length != plan.tokens:
        raise ValueError(
            f"pack {plan.number} was planned with {plan.tokens} tokens and has {pack.sequence_length}; "
            "the index changed under the run: build it anew, or run data_tools/build_index.py's output unchanged"
        )


class PackLoader:
    """Endless iterator of `StepBatch` for one data-parallel replica, starting where the planner's loaded state stands."""

    def __init__(
        self, planner: Planner, reader: PackReader, replica: int = 0, replicas: int = 1, num_workers: int = 0, prefetch_factor: int = 2,
        sizes: BatchSizes | None = None,
    ) -> None:  # fmt: skip
        """``prefetch_factor`` packs are read ahead by each of ``num_workers`` processes; 0 workers read in this process. ``sizes`` of
        the global batches are the planner's own, always the same, by default."""
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} of {replicas} does not exist")
        self.planner, self.reader = planner, reader
        self.replica, self.replicas = replica, replicas
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.consumed_packs = planner.made
        self.sizes = sizes or BatchSizes.of(planner.config.global_batch_size, [])
        for size in self.sizes.steps:
            assign_packs([PackPlan(number, (), 0, 0.0) for number in range(size)], replicas)  # refuse uneven sizes now
        self._batches: list[list[PackPlan]] = []  # planned, not yet handed out
        self._loaded: Iterator[LoadedPack] | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._loaded is None:
            ahead = {"prefetch_factor": self.prefetch_factor, "worker_init_fn": leave_signals_to_the_ranks} if self.num_workers else {}
            plans = _Plans(self)
            self._loaded = iter(DataLoader(self.reader, batch_size=None, sampler=plans, num_workers=self.num_workers, **ahead))
        each = self.sizes.at(self.consumed_packs) // self.replicas
        packs = [next(self._loaded) for _ in range(each)]
        plans = self._batches.pop(0)
        self.consumed_packs += len(plans)
        return StepBatch(packs, plans)

    def replaced(self, batch: StepBatch, failed: Sequence[tuple[int, int]]) -> StepBatch:
        """``batch`` with other samples in the places ``failed``, (pack of the batch, sample of the pack), read in this process.

        Raises ValueError when a dataset has no sample to put there.
        """
        places: dict[int, list[int]] = {}
        for pack, sample in failed:
            places.setdefault(pack, []).append(sample)
        plans = [
            replaced_plan(pack.plan, places[number], self.reader.sources, self.planner.config) if number in places else pack.plan
            for number, pack in enumerate(batch.packs)
        ]
        # Who reads an image depends on all images of the step, so where ranks share them other packs are read again too.
        again = range(len(plans)) if self.reader.share is not None else places
        packs = [self.reader[StepPlan(tuple(plans), number)] if number in again else pack for number, pack in enumerate(batch.packs)]
        new = {plan.number: plan for plan in plans}
        return StepBatch(packs, [new.get(plan.number, plan) for plan in batch.plans])

    def state_dict(self) -> dict[str, Any]:
        """The planner's state after the packs handed out so far, whatever the workers have read beyond."""
        return self.planner.state_at(self.consumed_packs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state; what was read ahead is thrown away."""
        self.close()
        self.planner.load_state_dict(state)
        self.consumed_packs = self.planner.made

    def close(self) -> None:
        """Stop the workers. Iterating again continues after the packs handed out."""
        self._loaded = None
        self._batches.clear()

    def plan_next(self) -> list[PackPlan]:
        """Plan the next global batch beyond all planned ones, and give this replica's packs of it."""
        first = self.consumed_packs + sum(map(len, self._batches))
        plans = self.planner.packs(first, self.sizes.at(first))
        self._batches.append(plans)
        return assign_packs(plans, self.replicas)[self.replica]


class _Plans:
    """Sampler over this replica's plans. The data loader draws from it as its workers fall idle."""

    def __init__(self, loader: PackLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[StepPlan]:
        while True:
            packs = tuple(self.loader.plan_next())
            yield from (StepPlan(packs, number) for number in range(len(packs)))
