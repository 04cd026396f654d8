# SPDX-License-Identifier: Apache-2.0
"""Named models and packs, so that a number in a report can be measured again by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel import platform
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack

SEED = 53


@dataclass(frozen=True)
class BenchConfig:
    """A model and the pack it is timed on: counts of samples per kind, text lengths, and image sides in pixels."""

    arch: BagelArch
    t2i: int
    edits: int
    questions: int
    text_lengths: tuple[int, int]
    image_sides: tuple[int, int]


def _bench(
    hidden: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, vit: ViTArch, ae: AutoencoderArch, latent_side: int = 32
) -> BagelArch:
    llm = LLMArch(hidden, mlp, layers, heads, kv, vocab, qk_norm=True, layer_module="Qwen2MoTDecoderLayer")
    patches = vit.image_size // vit.patch_size
    return BagelArch(llm, vit, ae, latent_patch_size=2, max_latent_size=latent_side, vit_max_num_patch_per_side=patches)


CONFIGS = {
    # 14 samples, 20 images of 64 to 128 pixels, about 2,150 tokens; the select layer leaves 4 of the ViT's 5 layers.
    "bench-53m": BenchConfig(
        _bench(512, 8, 8, 2, 1408, 4096, ViTArch(256, 704, 5, 4, image_size=224), AutoencoderArch(32, (1, 2, 4, 4), 2)),
        t2i=6,
        edits=4,
        questions=4,
        text_lengths=(38, 78),
        image_sides=(64, 128),
    ),  # fmt: skip
    # BAGEL-7B-MoT itself, for generation: 14.7 billion parameters.
    "bagel-7b": BenchConfig(
        _bench(3584, 28, 28, 4, 18944, 152064, ViTArch(1152, 4304, 27, 16, image_size=980), AutoencoderArch(), latent_side=64),
        t2i=8,
        edits=4,
        questions=4,
        text_lengths=(30, 120),
        image_sides=(256, 512),
    ),  # fmt: skip
    # For one GPU of 80 GB: a seventh of BAGEL-7B-MoT, its layers and tokens at their real sizes (4 of 28 decoder layers, 4 of 26 ViT
    # layers, a seventh of the vocabulary), and the whole FLUX autoencoder; 26 images of 256 to 512 pixels.
    "bench-7b-seventh": BenchConfig(
        _bench(3584, 4, 28, 4, 18944, 21728, ViTArch(1152, 4304, 5, 16, image_size=980), AutoencoderArch(), latent_side=64),
        t2i=8,
        edits=4,
        questions=4,
        text_lengths=(30, 120),
        image_sides=(256, 512),
    ),  # fmt: skip
    # Seconds instead of minutes, for the test of this benchmark.
    "bench-tiny": BenchConfig(
        _bench(64, 2, 4, 2, 96, 256, ViTArch(32, 48, 2, 2, image_size=224), AutoencoderArch(32, (1, 1, 1, 1), 1)),
        t2i=2,
        edits=1,
        questions=1,
        text_lengths=(4, 9),
        image_sides=(32, 48),
    ),  # fmt: skip
}


def megatron_config(arch: BagelArch, recompute_layers: int = 0, bf16: bool = False) -> TransformerConfig:
    """Megatron's configuration on one rank, the first ``recompute_layers`` layers recomputed in the backward pass."""
    layout = None
    if recompute_layers:
        layout = MegatronArguments(recompute_granularity="full", recompute_method="block", recompute_num_layers=recompute_layers)
    return transformer_config(arch.llm, layout, bf16, on_cpu=not platform.has_gpu())


def _items(config: BenchConfig, random: np.random.Generator, times: int = 1) -> list[tuple[Item, ...]]:
    """Draw the items of ``times`` as many samples as the config names."""
    arch = config.arch

    def text(loss: bool = False) -> Item:
        length = int(random.integers(*config.text_lengths, endpoint=True))
        return Item("text", loss=loss, ids=random.integers(4, arch.llm.vocab_size, length).astype(np.int64))

    def image(kind: str, number: int, loss: bool = False) -> Item:
        stride = arch.vae_token_pixels if kind == "vae" else 14
        low, high = (side // stride for side in config.image_sides)
        height, width = (int(side) * stride for side in random.integers(low, high, 2, endpoint=True))
        return Item(kind, loss=loss, image=number, height=height, width=width)

    plans: list[tuple[Item, ...]] = [(text(), image("vae", 0, loss=True)) for _ in range(config.t2i * times)]
    plans += [(image("vae", 0), image("vit", 0), text(), image("vae", 1, loss=True)) for _ in range(config.edits * times)]
    # Every other question is about two pictures.
    plans += [(*(image("vit", i) for i in range(1 + n % 2)), text(), text(loss=True)) for n in range(config.questions * times)]
    return plans


def _pack(config: BenchConfig, plans: Sequence[tuple[Item, ...]]) -> Pack:
    arch = config.arch
    samples = [Sample("bench", index, 0, items) for index, items in enumerate(plans)]
    spec = LayoutSpec(0, 1, 2, 3, 14, arch.vit_max_num_patch_per_side, arch.vae_token_pixels, arch.max_latent_size, arch.interpolate_pos)
    return build_pack(samples, spec)


def bench_pack(config: BenchConfig, times: int = 1) -> Pack:
    """The pack of a named config, its samples ``times`` over; the same on every machine."""
    return _pack(config, _items(config, keyed_generator(SEED, "pack"), times))


def filled_pack(config: BenchConfig, tokens: int) -> Pack:
    """A pack of at most ``tokens`` tokens: samples as a named config has them, round after round until none of a whole round fits.

    Raises ValueError if one round of the samples is longer.
    """
    if (shortest := bench_pack(config).sequence_length) > tokens:
        raise ValueError(f"one round of the samples has {shortest} tokens, more than {tokens}")
    random, taken, room, fits = keyed_generator(SEED, "pack"), [], tokens, True
    while fits:
        fits = False
        for items in _items(config, random):
            if (length := _pack(config, [items]).sequence_length) <= room:
                taken.append(items)
                room, fits = room - length, True
    return _pack(config, taken)
