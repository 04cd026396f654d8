"""A typical pack for a plan, laid out by the same code as a real one: text-to-image samples and questions about pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack, sample_tokens


@dataclass(frozen=True)
class Mix:
    """What a pack is made of: ``generation_share`` of its tokens in samples of a caption and a picture to generate, the rest in
    samples of a picture, a question and its answer. Sides in pixels."""

    generation_share: float
    image_size: int
    caption_tokens: int
    vit_image_size: int
    answer_tokens: int

    @classmethod
    def of(cls, arguments: PlanArguments) -> Mix:
        """From flags."""
        return cls(
            arguments.generation_share, arguments.image_size, arguments.caption_tokens, arguments.vit_image_size, arguments.answer_tokens
        )


def typical_pack(arch: BagelArch, mix: Mix, tokens: int) -> Pack:
    """As many samples of ``mix`` as ``tokens`` hold. Raises ValueError where not one does, or a picture is too large for the model."""
    spec = LayoutSpec(
        0, 1, 2, 3, arch.vit.patch_size if arch.vit else 14, arch.vit_max_num_patch_per_side, arch.vae_token_pixels, arch.max_latent_size
    )
    generate, answer = _generation(arch, mix, spec), _question(arch, mix, spec)
    sizes = sample_tokens(Sample("plan", 0, 0, generate), spec), sample_tokens(Sample("plan", 0, 0, answer), spec)
    samples: list[Sample] = []
    filled = [0, 0]
    while True:
        # Whichever kind is furthest behind its share comes next.
        behind = mix.generation_share * (sum(filled) + sizes[0]) - filled[0]
        kind = 0 if behind > 0 and mix.generation_share > 0 else 1
        if sum(filled) + sizes[kind] > tokens:
            kind = 1 - kind
            shared = mix.generation_share if kind == 0 else 1 - mix.generation_share
            if not shared or sum(filled) + sizes[kind] > tokens:
                break
        samples.append(Sample("plan", len(samples), 0, (generate, answer)[kind]))
        filled[kind] += sizes[kind]
    if not samples:
        raise ValueError(f"--max_num_tokens {tokens} holds no sample of {min(sizes)} tokens; lower --image_size or --vit_image_size")
    return build_pack(samples, spec)


def _text(tokens: int, loss: bool = False) -> Item:
    # Borders take two tokens.
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


def _side(name: str, pixels: int, stride: int, most: int) -> int:
    """``pixels`` rounded down to whole tokens."""
    if not stride <= pixels <= stride * most:
        raise ValueError(f"--{name} {pixels} is not between {stride} and {stride * most} pixels, which the model's positions cover")
    return pixels // stride * stride
