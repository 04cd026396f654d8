# SPDX-License-Identifier: Apache-2.0
"""Every picture has one reader per replica, shares cost alike, and what is planned from samples is what the packs hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, EncodingShare, PlannedImage, assign_images, planned_images
from megatron_bagel.data.loading.pack_reader import PackReader, StepPlan
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import build_pack, sample_tokens
from tests import strategies
from tests.data.loading.test_loader import SPEC, Pictures

COSTS = EncoderCosts(vit_token=0.06, vit_pair=1e-5, vae_token=0.024)


def images() -> st.SearchStrategy[list[list[PlannedImage]]]:
    """Packs of a step, with pictures that several images show."""
    one = st.builds(PlannedImage, st.sampled_from(["vit", "vae"]), st.integers(0, 3), st.integers(0, 2), st.integers(1, 5000))
    return st.lists(st.lists(one, max_size=12), min_size=1, max_size=4)


@given(images(), st.integers(1, 9))
def test_pictures_stay_together_and_costs_are_shared(packs: list[list[PlannedImage]], ranks: int) -> None:
    owners = assign_images(packs, ranks, COSTS)
    assert [len(each) for each in owners] == [len(each) for each in packs]
    loads, pictures, readers = np.zeros(ranks), {}, {}
    for number, (pack, own) in enumerate(zip(packs, owners, strict=True)):
        for image, owner in zip(pack, own, strict=True):
            assert 0 <= owner < ranks
            key = (number, image.sample, image.image)
            assert readers.setdefault(key, owner) == owner
            loads[owner] += COSTS.image(image)
            pictures[key] = pictures.get(key, 0.0) + COSTS.image(image)
    # Graham's bound: whoever has most got his last picture when he had no more than the average.
    assert loads.max() <= loads.mean() + max(pictures.values(), default=0.0) + 1e-9


@given(strategies.samples())
def test_samples_tell_the_images_of_their_pack(samples: list[Sample]) -> None:
    in_pack = [(image.kind, image.sample, image.image, image.tokens) for image in build_pack(samples, strategies.SPEC).images]
    planned = planned_images(samples, strategies.SPEC)
    assert [(image.kind, image.sample, image.image, image.tokens) for image in planned] == in_pack


def test_costs_count_what_the_encoders_do() -> None:
    """A frozen tower has no backward pass; long images pay for attention; without a part there is nothing to pay."""
    llm = LLMArch(64, 128, 2, 4, 2, vocab_size=100)
    arch = BagelArch(llm=llm, vit=ViTArch(32, 64, 2, 2), autoencoder=AutoencoderArch(), vit_max_num_patch_per_side=16)
    costs, frozen = EncoderCosts.of(arch), EncoderCosts.of(arch, frozen_vit=True)
    assert frozen.vit_token == pytest.approx(costs.vit_token / 3) and frozen.vae_token == costs.vae_token
    vit = arch.vit
    layer = 2 * (4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size)
    assert costs.vit_pair / costs.vit_token == pytest.approx(4 * vit.hidden_size / layer)
    assert EncoderCosts.of(replace(arch, vit=None)).image(PlannedImage("vit", 0, 0, 100)) == 0


class Counted(Pictures):
    """Notes every picture that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[int, int, str]] = []

    def pixels(self, index: int, image) -> torch.Tensor:
        self.read.append((index, image.image, image.kind))
        return super().pixels(index, image)


def plans(source: Pictures) -> tuple[PackPlan, ...]:
    """Three packs of three samples."""
    rows = [[3 * pack + place for place in range(3)] for pack in range(3)]
    return tuple(
        PackPlan(pack, tuple((0, row, 0) for row in each), sum(sample_tokens(source.sample(row, 0), SPEC) for row in each), 1.0)
        for pack, each in enumerate(rows)
    )


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_each_image_is_read_once_per_replica(ranks: int) -> None:
    """Together the ranks read all images, each of them once, and get the pixels that a reader of everything gets."""
    source = Counted()
    packs = plans(source)
    whole = [PackReader([source], SPEC, seed=9)[plan] for plan in packs]
    everything, source.read = sorted(source.read), []
    found: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(ranks):
        reader = PackReader([source], SPEC, seed=9, share=EncodingShare(rank, ranks, COSTS))
        for number in range(len(packs)):
            loaded = reader[StepPlan(packs, number)]
            assert np.array_equal(loaded.raw_timesteps, whole[number].raw_timesteps)
            pixels = {"vit": iter(loaded.vit_images()), "vae": iter(loaded.vae_images())}
            for place, (image, is_read) in enumerate(zip(loaded.pack.images, loaded.is_read, strict=True)):
                if is_read:
                    found[number, place] = next(pixels[image.kind])
    assert sorted(source.read) == everything
    for number, loaded in enumerate(whole):
        pixels = {"vit": iter(loaded.vit_images()), "vae": iter(loaded.vae_images())}
        for place, image in enumerate(loaded.pack.images):
            assert torch.equal(found[number, place], next(pixels[image.kind]))
