# SPDX-License-Identifier: Apache-2.0
"""The cached passes of generation against the training path: one pack, one mask, no cache, the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_bagel.data.transforms import image_tensor, output_size, vit_patches
from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack
from megatron_bagel.model.batch import Features, make_microbatch
from megatron_bagel.model.flow import patchify

TIME = 0.7


def layout_spec(engine: Engine) -> LayoutSpec:
    tokens, arch = engine.tokenizer, engine.arch
    return LayoutSpec(
        tokens.bos, tokens.eos, tokens.start_of_image, tokens.end_of_image,
        arch.vit.patch_size, arch.vit_max_num_patch_per_side, arch.vae_token_pixels, arch.max_latent_size,
    )  # fmt: skip


def image_item(kind: str, size: tuple[int, int], loss: bool = False) -> Item:
    return Item(kind, loss=loss, image=0, width=size[0], height=size[1])


def clean_latents(engine: Engine, image: Image.Image, noise: Tensor) -> Tensor:
    mean, logvar = engine.autoencoder.encode_moments(image_tensor(image, engine.vae_transform, *image.size)[None])
    return patchify(engine.autoencoder.sample(mean[0], logvar[0], noise), engine.arch.latent_patch_size)


def vision_features(engine: Engine, image: Image.Image, pack: Pack) -> Tensor:
    size = output_size(engine.vit_transform, *image.size)
    patches = vit_patches(image_tensor(image, engine.vit_transform, *size), engine.arch.vit.patch_size)
    return engine.vision_tower(patches, torch.from_numpy(pack.vit_position_ids), [len(patches)])


@torch.no_grad()
def test_velocity_under_a_context_equals_the_training_path(engine: Engine, pictures: list[Image.Image]) -> None:
    """[clean image][ViT image][text][noised image]: what an edit is trained on is what generation computes."""
    image, ids = engine.resize(pictures[0]), engine.tokenizer.encode("make the square blue")
    posterior = KeyedNoise(0).posterior(engine.posterior_shape(image))
    vit_size, target = output_size(engine.vit_transform, *image.size), (24, 16)
    items = (
        image_item("vae", image.size),
        image_item("vit", vit_size),
        Item("text", ids=np.array(ids)),
        image_item("vae", target, loss=True),
    )
    pack = build_pack([Sample("t/t", 0, 0, items)], layout_spec(engine))
    clean = clean_latents(engine, image, posterior)
    x_t = torch.randn(6, engine.arch.latent_token_dim, generator=torch.Generator().manual_seed(3))
    # The training path forms x_t = (1 - t) clean + t noise; with clean 0 and noise x_t / t that is x_t.
    features = Features(
        vision_features(engine, image, pack),
        torch.cat((clean, torch.zeros_like(x_t))),
        torch.cat((torch.zeros_like(clean), x_t / TIME)),
        torch.cat((torch.zeros(len(clean)), torch.full((len(x_t),), TIME))),
    )
    batch = make_microbatch(pack, expert_order(pack), features, "dense")
    model = engine.decoder
    hidden = model.decode(model.embed(batch), batch.n_und, batch.n_vae, batch.position_ids, batch.attention)
    normed = model.final_norm(hidden, batch.n_und, batch.n_vae)
    expected = model.velocity(normed[batch.mse_slots])

    contexts = engine.add_latents([Context()], [image], [posterior])
    contexts = engine.add_features(contexts, [image])
    contexts = engine.add_text(contexts, [ids])
    grid = engine.latent_grid(target[1], target[0])
    embedded = engine.embed_latents(x_t, TIME, engine.latent_position_ids(*grid))
    (got,) = engine.velocities(contexts, [embedded])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert contexts[0].length + len(x_t) + 2 == pack.sequence_length
    assert contexts[0].position == int(pack.position_ids[-1])


@torch.no_grad()
def test_cached_logits_equal_uncached(engine: Engine) -> None:
    """A text read token by token predicts what one causal pass over all of it predicts."""
    ids = engine.tokenizer.encode("the circle is red")
    pack = build_pack([Sample("t/t", 0, 0, (Item("text", loss=True, ids=np.array(ids)),))], layout_spec(engine))
    empty = torch.zeros(0, engine.arch.latent_token_dim)
    batch = make_microbatch(pack, expert_order(pack), Features(None, empty, empty, torch.zeros(0)), "dense")
    model = engine.decoder
    hidden = model.decode(model.embed(batch), batch.n_und, 0, batch.position_ids, batch.attention)
    expected = model.text_logits(model.final_norm(hidden, batch.n_und, 0)[batch.ce_slots])
    contexts, rows = [Context()], []
    for token in [engine.tokenizer.bos, *ids]:
        logits, contexts = engine.next_logits(contexts, [token])
        rows.append(logits[0])
    torch.testing.assert_close(torch.stack(rows), expected, atol=1e-5, rtol=1e-5)
    (at_once,) = engine.logits_of([Context()], [[engine.tokenizer.bos, *ids]])
    torch.testing.assert_close(torch.stack(rows), at_once, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_contexts_are_values(engine: Engine) -> None:
    """Two continuations of one context do not disturb each other, nor the context."""
    (start,) = engine.add_text([Context()], [[5, 6]])
    before = start.caches[1].keys.clone()
    first, _ = engine.next_logits([start], [7])
    engine.next_logits([start], [8])
    again, _ = engine.next_logits([start], [7])
    assert torch.equal(first, again) and torch.equal(start.caches[1].keys, before)


def test_sizes_the_model_cannot_draw_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="height 20 must be a positive multiple of 8"):
        engine.latent_grid(20, 16)
    with pytest.raises(ValueError, match="width 72 exceeds .* max_latent_size allows 64"):
        engine.latent_grid(16, 72)


def test_parts_the_model_lacks_are_named(engine: Engine, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="no vision tower"):
        replace(engine, vision_tower=None).add_features([Context()], pictures[:1])
    with pytest.raises(ValueError, match="no autoencoder"):
        replace(engine, autoencoder=None).need_autoencoder()
