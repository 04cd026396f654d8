"""From plans to packs with pixels: worker processes read, decode and transform ahead of the training loop.

A worker gets a finished plan and draws nothing that is not keyed, so the number of workers changes speed and nothing else. The
plans come from a planner in the training process itself; the position that is saved is that of the packs handed out, not of
those the workers are busy with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.counts import SampleSource
from megatron_bagel.data.loader_noise import raw_timesteps
from megatron_bagel.data.planner import Planner
from megatron_bagel.data.planner_deal import PackPlan, deal
from megatron_bagel.data.transforms import vit_patches
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, PackImage, build_pack


class ReadableSource(SampleSource, Protocol):
    """A source whose samples can be read, not only planned. It must be picklable where workers are spawned."""

    def sample(self, index: int, epoch: int) -> Sample:
        """The plan of one sample, with its token ids."""
        ...

    def pixels(self, index: int, image: PackImage) -> torch.Tensor:
        """One transformed image of a sample, float32 [3, height, width]. Raises ValueError when it cannot be decoded."""
        ...


@dataclass
class LoadedPack:
    """A pack with its pixels. Images of a kind share one buffer: a tensor per image would cost a file handle each on its way
    from a worker.

    ``vit_patches`` [n_vit, patch * patch * 3] in sequence order; ``vae_buffer`` holds the VAE images one after the other;
    ``raw_timesteps`` float32 [VAE images], -inf for clean ones.
    """

    plan: PackPlan
    pack: Pack
    vit_patches: torch.Tensor
    vae_buffer: torch.Tensor
    raw_timesteps: np.ndarray

    def vae_images(self) -> list[torch.Tensor]:
        """Views [3, height, width] of the VAE images, in sequence order."""
        images = self.pack.images_of("vae")
        pieces = torch.split(self.vae_buffer, [3 * image.height * image.width for image in images])
        return [piece.view(3, image.height, image.width) for piece, image in zip(pieces, images, strict=True)]


@dataclass(frozen=True)
class StepBatch:
    """What one replica trains on in one step: its ``packs`` (microbatches), out of the global batch's ``plans``."""

    packs: list[LoadedPack]
    plans: list[PackPlan]


class PackReader(Dataset):
    """Reads planned packs; ``reader[plan]`` runs in a worker."""

    def __init__(self, sources: Sequence[ReadableSource], spec: LayoutSpec, seed: int) -> None:
        """``seed`` names the timestep draws."""
        self.sources, self.spec, self.seed = list(sources), spec, seed

    def __getitem__(self, plan: PackPlan) -> LoadedPack:
        pack = build_pack([self.sources[source].sample(index, epoch) for source, index, epoch in plan.samples], self.spec)
        if pack.sequence_length != plan.tokens:
            raise ValueError(
                f"pack {plan.number} was planned with {plan.tokens} tokens and has {pack.sequence_length}; "
                "the index changed under the run: build it anew, or run data_tools/build_index.py's output unchanged"
            )
        patches = [vit_patches(self._pixels(plan, image), self.spec.vit_patch) for image in pack.images_of("vit")]
        pixels = [self._pixels(plan, image).reshape(-1) for image in pack.images_of("vae")]
        return LoadedPack(
            plan=plan,
            pack=pack,
            vit_patches=torch.cat(patches) if patches else torch.zeros(0, 3 * self.spec.vit_patch**2),
            vae_buffer=torch.cat(pixels) if pixels else torch.zeros(0),
            raw_timesteps=raw_timesteps(pack, self.seed),
        )

    def _pixels(self, plan: PackPlan, image: PackImage) -> torch.Tensor:
        source, index, _ = plan.samples[image.sample]
        try:
            pixels = self.sources[source].pixels(index, image)
        except (ValueError, OSError) as error:
            raise ValueError(f"image {image.image} of {self.sources[source].describe(index)} cannot be read: {error}") from error
        if tuple(pixels.shape) != (3, image.height, image.width):
            raise ValueError(
                f"image {image.image} of {self.sources[source].describe(index)} has shape {tuple(pixels.shape)} after its transform, "
                f"planned were {(3, image.height, image.width)}; the index was built from another file: build it anew"
            )
        return pixels


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
            deal([PackPlan(number, (), 0, 0.0) for number in range(size)], replicas)  # refuse uneven sizes now
        self._batches: list[list[PackPlan]] = []  # planned, not yet handed out
        self._loaded: Iterator[LoadedPack] | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._loaded is None:
            ahead = {"prefetch_factor": self.prefetch_factor} if self.num_workers else {}
            plans = _Plans(self)
            self._loaded = iter(DataLoader(self.reader, batch_size=None, sampler=plans, num_workers=self.num_workers, **ahead))
        each = self.sizes.at(self.consumed_packs) // self.replicas
        packs = [next(self._loaded) for _ in range(each)]
        plans = self._batches.pop(0)
        self.consumed_packs += len(plans)
        return StepBatch(packs, plans)

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
        return deal(plans, self.replicas)[self.replica]


class _Plans:
    """Sampler over this replica's plans. The data loader draws from it as its workers fall idle."""

    def __init__(self, loader: PackLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[PackPlan]:
        while True:
            yield from self.loader.plan_next()
