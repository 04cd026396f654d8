# SPDX-License-Identifier: Apache-2.0
"""Lays out a typical pack for a plan with the code of training: text-to-image samples and questions about pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack, sample_tokens


@dataclass(frozen=True)
class Mix:
    """The composition of a pack.

    ``generation_share`` of its tokens are in samples of a caption and a picture to generate, the rest in samples of a picture, a
    question and its answer. Image sizes are sides in pixels.
    """

    generation_share: float
    image_size: int
    caption_tokens: int
    vit_image_size: int
    answer_tokens: int

    @classmethod
    def of(cls, arguments: PlanArguments) -> Mix:
        """Return the composition that the flags describe."""
        return cls(
            arguments.generation_share, arguments.image_size, arguments.caption_tokens, arguments.vit_image_size, arguments.answer_tokens
        )


def typical_pack(arch: BagelArch, mix: Mix, tokens: int) -> Pack:
    """Return a pack with as many samples of ``mix`` as fit into ``tokens``.

    Raises:
        ValueError: Not one sample fits, or a picture is too large for the model.
    """
    spec = LayoutSpec(
        0, 1, 2, 3, arch.vit.patch_size if arch.vit else 14, arch.vit_max_num_patch_per_side, arch.vae_token_pixels, arch.max_latent_size
    )
    generation, question = _generation(arch, mix, spec), _question(arch, mix, spec)
    sizes = sample_tokens(Sample("plan", 0, 0, generation), spec), sample_tokens(Sample("plan", 0, 0, question), spec)
    samples: list[Sample] = []
    totals = [0, 0]
    while True:
        # The kind that is furthest below its share comes next.
        missing = mix.generation_share * (sum(totals) + sizes[0]) - totals[0]
        kind = 0 if missing > 0 and mix.generation_share > 0 else 1
        if sum(totals) + sizes[kind] > tokens:
            kind = 1 - kind
            share = mix.generation_share if kind == 0 else 1 - mix.generation_share
            if not share or sum(totals) + sizes[kind] > tokens:
                break
        samples.append(Sample("plan", len(samples), 0, (generation, question)[kind]))
        totals[kind] += sizes[kind]
    if not samples:
        raise ValueError(
            f"--max_num_tokens {tokens} holds no sample of {min(sizes)} tokens; raise it, or lower --image_size or --vit_image_size"
        )
    return build_pack(samples, spec)


def _text(tokens: int, loss: bool = False) -> Item:
    # The two border tokens are part of ``tokens``.
    return Item("text", loss=loss, ids=np.zeros(max(0, tokens - 2), dtype=np.int64))


def _generation(arch: BagelArch, mix: Mix, spec: LayoutSpec) -> tuple[Item, ...]:
    if arch.autoencoder is None:
        return (_text(mix.caption_tokens), _text(mix.caption_tokens, loss=True))
    side = _side("image_size", mix.image_size, spec.vae_downsample, spec.max_latent_size)
    return (_text(mix.caption_tokens), Item("vae", loss=True, image=0, height=side, width=side))


def _question(arch: BagelArch, mix: Mix, spec: LayoutSpec) -> tuple[Item, ...]:
    half = mix.answer_tokens // 2
    texts = (_text(mix.answer_tokens - half), _text(half, loss=True))
    if arch.vit is None:
        return texts
    side = _side("vit_image_size", mix.vit_image_size, spec.vit_patch, spec.vit_max_side)
    return (Item("vit", image=0, height=side, width=side), *texts)


def _side(name: str, pixels: int, stride: int, max_tokens: int) -> int:
    """Round ``pixels`` down to whole tokens. Raises ValueError outside of the positions of the model."""
    if not stride <= pixels <= stride * max_tokens:
        raise ValueError(f"--{name} {pixels} is not between {stride} and {stride * max_tokens} pixels, which the model's positions cover")
    return pixels // stride * stride
