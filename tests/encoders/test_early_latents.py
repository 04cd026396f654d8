# SPDX-License-Identifier: Apache-2.0
"""Latents that are encoded before their step: the same bits, given out once, and only for the packs they were made for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from tests.data.loading.test_encoder_assignment import plans
from tests.data.loading.test_loader import SPEC, Pictures
from tests.encoders.test_sharded_image_encoding import ARCH


class CountedAutoEncoder(AutoEncoder):
    """Counts its calls."""

    calls = 0

    def encode_many(self, images: Any) -> Any:
        self.calls += 1
        return super().encode_many(images)


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(ARCH, None, CountedAutoEncoder(ARCH.autoencoder).requires_grad_(False), ImageEncoderSettings(seed=3))


@pytest.fixture
def packs() -> list[LoadedPack]:
    source = Pictures()
    return [PackReader([source], SPEC, seed=9)[plan] for plan in plans(source)]


def latents(encoder: ImageEncoder, packs: list[LoadedPack]) -> tuple[torch.Tensor, int]:
    """Latents of all packs, and the calls of the autoencoder that ``encode`` made."""
    before = encoder.autoencoder.calls
    return torch.cat([features.latents for features in encoder.encode(packs)]), encoder.autoencoder.calls - before


def test_early_latents_are_taken_once(encoder: ImageEncoder, packs: list[LoadedPack]) -> None:
    """A step that is computed again encodes again, so that a fault of the autoencoder's device does not come again."""
    expected, calls = latents(encoder, packs)
    encoder.encode_ahead(packs)
    encoder.encode_ahead(packs)  # the second attempt at the step before
    assert encoder.autoencoder.calls == 2 * calls > 0
    first, second = latents(encoder, packs), latents(encoder, packs)
    assert (first[1], second[1]) == (0, calls)
    assert torch.equal(first[0], expected) and torch.equal(second[0], expected)


def test_other_packs_in_between_change_nothing(encoder: ImageEncoder, packs: list[LoadedPack]) -> None:
    """An evaluation between two steps."""
    expected, calls = latents(encoder, packs)
    encoder.encode_ahead(packs)
    assert latents(encoder, packs[:1])[1] > 0
    taken, new_calls = latents(encoder, packs)
    assert new_calls == 0 and torch.equal(taken, expected)


def test_replaced_packs_are_encoded_in_their_step(encoder: ImageEncoder, packs: list[LoadedPack]) -> None:
    """One pack that was read again is enough: where ranks share the images, all of them may have other owners now."""
    expected, calls = latents(encoder, packs)
    encoder.encode_ahead(packs)
    again = [replace(packs[0]), *packs[1:]]
    assert latents(encoder, again)[1] == calls
    encoder.encode_ahead(again)
    taken, new_calls = latents(encoder, again)
    assert new_calls == 0 and torch.equal(taken, expected)


def test_packs_with_unreadable_samples_are_not_encoded_early(encoder: ImageEncoder, packs: list[LoadedPack]) -> None:
    encoder.encode_ahead([replace(packs[0], failures=((0, "broken"),)), *packs[1:]])
    encoder.encode_ahead([])
    assert encoder.autoencoder.calls == 0
    ImageEncoder(ARCH, None, None, ImageEncoderSettings(seed=3)).encode_ahead(packs)  # a middle stage
