# SPDX-License-Identifier: Apache-2.0
"""Ranks that share the encoding get the features of one that does it all, and their towers' gradients sum up to its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, EncodingShare
from megatron_bagel.data.loading.pack_reader import PackReader, StepPlan
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from megatron_bagel.encoders.sharded_image_encoding import ShardedImageEncoder
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.parallel.replica import make_replica
from tests.data.loading.test_encoder_assignment import plans
from tests.data.loading.test_loader import SPEC, Pictures
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed

ARCH = BagelArch(
    llm=LLMArch(32, 64, 1, 2, 2, vocab_size=64),
    vit=ViTArch(32, 64, 2, 2, image_size=112),
    autoencoder=AutoencoderArch(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4),
    vit_max_num_patch_per_side=8,
    max_latent_size=8,
    vit_select_layer=-1,
)


def _compare(read_all: bool) -> int:
    """Number of images this rank encoded, after all comparisons."""
    torch.manual_seed(0)
    tower, autoencoder = VisionTower(ARCH), AutoEncoder(ARCH.autoencoder).requires_grad_(False)
    tower.reset_parameters()
    settings, source = ImageEncoderSettings(seed=3), Pictures()
    packs = plans(source)
    alone = ImageEncoder(ARCH, copy.deepcopy(tower), autoencoder, settings)
    whole = [PackReader([source], SPEC, seed=9)[plan] for plan in packs]
    expected = alone.encode(whole)

    replica = make_replica()
    share = EncodingShare(replica.rank, replica.size, EncoderCosts.of(ARCH))
    reader = PackReader([source], SPEC, seed=9, share=share)
    image_encoder = ShardedImageEncoder(ARCH, tower, autoencoder, settings, replica, share)
    loaded = whole if read_all else [reader[StepPlan(packs, number)] for number in range(len(packs))]
    features = image_encoder.encode(loaded)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    cp_rank, cp_size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    for ours, theirs in zip(features, expected, strict=True):
        assert (ours.vit is not None) == first
        generator = torch.Generator().manual_seed(5)
        weights = torch.randn(theirs.vit.shape, generator=generator)
        (theirs.vit * weights).sum().backward()
        if first:
            torch.testing.assert_close(ours.vit, theirs.vit)
            # A context-parallel rank reads its own tokens alone.
            weights[torch.arange(len(weights)) % cp_size != cp_rank] = 0
            (ours.vit * weights).sum().backward()
        if first or last:
            torch.testing.assert_close(ours.latents, theirs.latents)
            assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.timesteps, theirs.timesteps)
    image_encoder.backward()
    alone.backward()
    for mine, theirs in zip(tower.parameters(), alone.tower.parameters(), strict=True):
        dist.all_reduce(mine.grad, group=replica.group)
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    return sum(int(pack.is_read.sum()) for pack in loaded if pack.is_read is not None)


LAYOUTS = [
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["tp2-pp2", "cp2-pp2"])
@pytest.mark.parametrize("read_all", [False, True], ids=["own", "all"])
def test_shared_encoding_is_that_of_one_rank(parallel: dict, read_all: bool) -> None:
    counts = run_ranks(_compare, 4, read_all, parallel=parallel)
    images = sum(len(PackReader([Pictures()], SPEC, seed=9)[plan].pack.images) for plan in plans(Pictures()))
    assert sum(counts) == (0 if read_all else images)
