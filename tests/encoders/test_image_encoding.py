# SPDX-License-Identifier: Apache-2.0
"""The image encoder on one process: what its settings change."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from tests.data.loading.test_encoder_assignment import plans
from tests.data.loading.test_loader import SPEC, Pictures
from tests.encoders.test_sharded_image_encoding import ARCH


def test_bf16_latents_are_near_those_of_fp32() -> None:
    """fp32 numbers that went through bf16's eight bits: near, and not the same."""
    torch.manual_seed(0)
    autoencoder, source = AutoEncoder(ARCH.autoencoder).requires_grad_(False), Pictures()
    packs = [PackReader([source], SPEC, seed=9)[plan] for plan in plans(source)]
    settings = ImageEncoderSettings(seed=3)
    exact, rounded = (ImageEncoder(ARCH, None, autoencoder, replace(settings, bf16=bf16)).encode(packs) for bf16 in (False, True))
    assert any(len(one.latents) for one in exact)
    for one, other in zip(exact, rounded, strict=True):
        assert one.latents.dtype == other.latents.dtype == torch.float32
        if len(one.latents):
            assert 0 < float((one.latents - other.latents).norm() / one.latents.norm()) < 1e-2
