# SPDX-License-Identifier: Apache-2.0
"""Features and gradients do not depend on how many images run through the tower together; memory does."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from megatron_bagel.encoders.tower_pass import ChunkedPass, StepPass, TowerImage
from megatron_bagel.encoders.vision_tower import VisionTower
from tests.data.loading.test_encoder_assignment import plans
from tests.data.loading.test_loader import SPEC, Pictures
from tests.encoders.test_sharded_image_encoding import ARCH

PATCH_VALUES = 3 * 14 * 14


@pytest.fixture
def tower() -> VisionTower:
    made = VisionTower(ARCH)
    made.reset_parameters(torch.Generator().manual_seed(0))
    return made


def images(*sides: tuple[int, int]) -> list[TowerImage]:
    """Random pixels of images with these numbers of patches per side."""
    generator = torch.Generator().manual_seed(1)
    return [
        TowerImage(torch.rand(rows * columns, PATCH_VALUES, generator=generator), torch.arange(rows * columns) % 8)
        for rows, columns in sides
    ]


SIDES = [(4, 5), (2, 2), (8, 8), (4, 5), (1, 3), (6, 2)]


def gradients(tower: VisionTower) -> list[torch.Tensor]:
    return [parameter.grad for parameter in tower.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("chunk_tokens", [1, 24, 30, 10_000])
def test_chunks_change_neither_features_nor_gradients(tower: VisionTower, chunk_tokens: int) -> None:
    towers, passes = (tower, copy.deepcopy(tower)), (StepPass("cpu"), ChunkedPass("cpu", chunk_tokens))
    features = [one.encode(its, images(*SIDES), PATCH_VALUES) for one, its in zip(passes, towers, strict=True)]
    assert not any(part.requires_grad for part in features) and all(one.waits_for_gradient for one in passes)
    torch.testing.assert_close(features[1], features[0], rtol=1e-6, atol=1e-6)
    gradient = torch.randn(features[0].shape, generator=torch.Generator().manual_seed(2))
    for one in passes:
        one.backward(gradient)
    assert len(gradients(towers[0])) == len(list(tower.parameters()))
    for ours, theirs in zip(gradients(towers[1]), gradients(towers[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max() + 1))
    assert not any(one.waits_for_gradient for one in passes)


@pytest.mark.parametrize("make", [lambda: StepPass("cpu"), lambda: ChunkedPass("cpu", 8)], ids=["step", "constant"])
def test_without_images_every_weight_gets_zeros(tower: VisionTower, make) -> None:
    """Data parallelism waits for a gradient of every weight."""
    one = make()
    features = one.encode(tower, [], PATCH_VALUES)
    assert features.shape == (0, ARCH.llm.hidden_size)
    one.backward(features)
    assert len(gradients(tower)) == len(list(tower.parameters())) and not any(grad.any() for grad in gradients(tower))
    with pytest.raises(ValueError, match="no features that wait"):
        one.backward(features)


def test_a_frozen_tower_and_an_evaluation_wait_for_nothing(tower: VisionTower) -> None:
    one = ChunkedPass("cpu", 8)
    with torch.no_grad():
        one.encode(tower, images((2, 2)), PATCH_VALUES)
    assert not one.waits_for_gradient
    one.encode(tower.requires_grad_(False), images((2, 2)), PATCH_VALUES)
    assert not one.waits_for_gradient


def test_gradients_are_exchanged_with_the_last_chunk_alone(tower: VisionTower) -> None:
    """As Megatron's DDP needs it: its hooks would reduce a bucket as soon as each gradient arrived once."""
    muted: list[bool] = []
    silent = False

    @contextmanager
    def no_sync():
        nonlocal silent
        silent = True
        yield
        silent = False

    tower.no_sync = no_sync
    tower.connector.fc2.bias.register_post_accumulate_grad_hook(lambda parameter: muted.append(silent))
    one = ChunkedPass("cpu", 24)
    one.backward(torch.ones_like(one.encode(tower, images(*SIDES), PATCH_VALUES)))
    assert muted == [True, True, True, False]


def saved_bytes(tower: VisionTower, chunk_tokens: int | None, copies: int) -> int:
    """The most bytes that autograd held at one time in both passes over ``copies`` times the images."""
    held = most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.nbytes
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.nbytes

    one = StepPass("cpu") if chunk_tokens is None else ChunkedPass("cpu", chunk_tokens)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        one.backward(torch.ones_like(one.encode(tower, images(*SIDES * copies), PATCH_VALUES)))
    return most


def test_memory_is_that_of_one_chunk(tower: VisionTower) -> None:
    step = [saved_bytes(tower, None, copies) for copies in (1, 8)]
    constant = [saved_bytes(tower, 70, copies) for copies in (1, 8)]
    assert step[1] > 5 * step[0] and constant[1] == constant[0] < step[0]


def test_the_image_encoder_uses_it(tower: VisionTower) -> None:
    source = Pictures()
    packs: list[LoadedPack] = [PackReader([source], SPEC, seed=9)[plan] for plan in plans(source)]
    towers = tower, copy.deepcopy(tower)
    encoders = [
        ImageEncoder(ARCH, its, None, ImageEncoderSettings(3, vit_chunk_tokens=chunk))
        for its, chunk in zip(towers, (None, 20), strict=True)
    ]
    for step, constant in zip(*(encoder.encode(packs) for encoder in encoders), strict=True):
        torch.testing.assert_close(constant.vit, step.vit, rtol=1e-6, atol=1e-6)
        for features in (step, constant):
            (features.vit * torch.linspace(-1, 1, features.vit.numel()).view_as(features.vit)).sum().backward()
    for encoder in encoders:
        encoder.backward()
    for ours, theirs in zip(gradients(towers[1]), gradients(towers[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max() + 1))
