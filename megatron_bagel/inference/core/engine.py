# SPDX-License-Identifier: Apache-2.0
"""What a trained model can do with a context: read text, read an image, predict a token, predict a velocity.

Every method takes lists with one entry per context, and makes one pass of the decoder for all of them. Contexts are values:
methods do not change them and return extended ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.data.transforms import TransformArgs, image_tensor, output_size, vit_patches
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.inference.core.cached_attention import CachedAttention, NewTokens
from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.decoder import Decoder
from megatron_bagel.inference.core.velocity_pass import VelocityPass
from megatron_bagel.layout.pack import grid_position_ids
from megatron_bagel.model.flow import patchify


@dataclass(frozen=True)
class PassRow:
    """New tokens of one context: embeddings by expert, and the number of RoPE positions they take.

    Text takes one position per token, and all tokens of an image share one.
    """

    context: Context
    und: Tensor
    gen: Tensor | None = None
    shared_position: bool = True

    @property
    def n_gen(self) -> int:
        """Return the number of tokens of the generation expert."""
        return 0 if self.gen is None else len(self.gen)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return the RoPE positions of the und and of the gen tokens."""
        start = self.context.position
        if self.shared_position:
            return torch.full((len(self.und),), start), torch.full((self.n_gen,), start)
        return torch.arange(start, start + len(self.und)), torch.zeros(0, dtype=torch.long)

    def advance(self) -> int:
        """Return the number of RoPE positions of the row."""
        return 1 if self.shared_position else len(self.und)


@dataclass
class Engine:
    """A model ready for inference, on one process or on each rank that shares its decoder; these ranks make the same calls.

    ``vision_tower`` is None in models without image understanding, ``autoencoder`` in those without image generation.
    """

    decoder: Decoder
    vision_tower: torch.nn.Module | None
    autoencoder: AutoEncoder | None
    tokenizer: Tokenizer
    arch: BagelArch
    vae_transform: TransformArgs
    vit_transform: TransformArgs

    @property
    def device(self) -> torch.device:
        """Return the device of the decoder's weights."""
        return next(iter(self.decoder.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the decoder's weights."""
        return next(iter(self.decoder.parameters())).dtype

    # ------------------------------------------------------------------ reading
    def add_text(self, contexts: Sequence[Context], ids: Sequence[Sequence[int]]) -> list[Context]:
        """Read [bos] + ids + [eos] into each context."""
        if not contexts:
            return []
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        texts = [[bos, *text, eos] for text in ids]
        embeddings = self._embed_ids([token for text in texts for token in text]).split([len(text) for text in texts])
        rows = [PassRow(context, rows, shared_position=False) for context, rows in zip(contexts, embeddings, strict=True)]
        return self._run(rows, causal=True, keep=True)[1]

    def resize(self, image: Image.Image) -> Image.Image:
        """Return an input image at the size for the autoencoder; the vision tower resizes this result again."""
        size = output_size(self.vae_transform, *image.size)
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def posterior_shape(self, image: Image.Image) -> tuple[int, int, int]:
        """Return the shape [z, h, w] of the posterior noise that ``add_latents`` needs for an image."""
        width, height = output_size(self.vae_transform, *image.size)
        ae = self.need_autoencoder().arch
        return ae.z_channels, height // ae.downsample, width // ae.downsample

    def add_latents(self, contexts: Sequence[Context], images: Sequence[Image.Image], noise: Sequence[Tensor]) -> list[Context]:
        """Read each RGB image through the autoencoder as a clean condition; ``noise`` [z, h, w] samples its posterior."""
        autoencoder = self.need_autoencoder()
        pixels = [image_tensor(image, self.vae_transform, *output_size(self.vae_transform, *image.size)) for image in images]
        moments = autoencoder.encode_many([p.to(self.device) for p in pixels])
        rows = []
        for context, (mean, logvar), eps in zip(contexts, moments, noise, strict=True):
            latent = autoencoder.sample(mean, logvar, eps.to(mean))
            grid = self._grid(latent.shape[-2:])
            tokens = patchify(latent, self.arch.latent_patch_size)
            rows.append(PassRow(context, self._borders(), self.embed_latents(tokens, 0.0, grid)))
        return self._run(rows, causal=False, keep=True)[1]

    def add_features(self, contexts: Sequence[Context], images: Sequence[Image.Image]) -> list[Context]:
        """Read each RGB image through the vision tower."""
        if self.vision_tower is None or self.arch.vit is None:
            raise ValueError("this model has no vision tower (visual_und off): it cannot look at images")
        patch, side = self.arch.vit.patch_size, self.arch.vit_max_num_patch_per_side
        pixels = [image_tensor(image, self.vit_transform, *output_size(self.vit_transform, *image.size)) for image in images]
        ids = [grid_position_ids(p.shape[1] // patch, p.shape[2] // patch, side, self.arch.interpolate_pos) for p in pixels]
        lengths = [len(i) for i in ids]
        patches = torch.cat([vit_patches(p, patch) for p in pixels]).to(self.device, self.dtype)
        positions = torch.cat([torch.from_numpy(i) for i in ids]).to(self.device)
        features = self.vision_tower(patches, positions, lengths).split(lengths)
        opening, closing = self._borders().split(1)
        rows = [PassRow(context, torch.cat((opening, f.to(opening), closing))) for context, f in zip(contexts, features, strict=True)]
        return self._run(rows, causal=False, keep=True)[1]

    # ------------------------------------------------------------------ predicting
    def next_logits(self, contexts: Sequence[Context], tokens: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """Read one token into each context; return logits [contexts, V] of the next token, and the extended contexts."""
        embeddings = self._embed_ids(tokens).split(1)
        rows = [PassRow(context, e, shared_position=False) for context, e in zip(contexts, embeddings, strict=True)]
        hidden, extended = self._run(rows, causal=True, keep=True)
        return self.decoder.all_text_logits(hidden), extended

    def logits_of(self, contexts: Sequence[Context], ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return logits [tokens, V] after each token of a text per context, in one pass; contexts are not extended."""
        embeddings = self._embed_ids([token for text in ids for token in text]).split([len(text) for text in ids])
        rows = [PassRow(context, e, shared_position=False) for context, e in zip(contexts, embeddings, strict=True)]
        hidden, _ = self._run(rows, causal=True, keep=False)
        return list(self.decoder.all_text_logits(hidden).split([len(text) for text in ids]))

    def velocities(self, contexts: Sequence[Context], embedded: Sequence[Tensor]) -> list[Tensor]:
        """Return the flow velocity [tokens, channels] of a noised picture under each context, float32; contexts are not extended.

        ``embedded`` [tokens, hidden] comes from ``embed_latents``; several contexts may share one picture.
        """
        sizes = [len(picture) for picture in embedded]
        return list(self.velocity_pass(contexts, sizes)(embedded).split(sizes))

    def velocity_pass(self, contexts: Sequence[Context], sizes: Sequence[int]) -> VelocityPass:
        """Return ``velocities`` of pictures of ``sizes`` tokens under each context, as a pass to repeat."""
        return VelocityPass(self.decoder, contexts, self._borders(), sizes)

    def embed_latents(self, x_t: Tensor, t: float, position_ids: Tensor) -> Tensor:
        """Embed latent tokens [tokens, channels] at time ``t`` (0 is clean) as decoder input [tokens, hidden]."""
        times = self.decoder.embed_times(torch.full((1,), t, dtype=torch.float32, device=self.device))
        return self.decoder.embed_latents(x_t.to(self.device), times, position_ids)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the (rows, columns) of latent tokens of a picture of ``height`` x ``width`` pixels.

        Raises:
            ValueError: If a side is not a multiple of a token's pixels, or exceeds the position table.
        """
        stride, limit = self.arch.vae_token_pixels, self.arch.max_latent_size * self.arch.vae_token_pixels
        for name, side in (("height", height), ("width", width)):
            if side < stride or side % stride:
                raise ValueError(f"image {name} {side} must be a positive multiple of {stride}, the pixels of a latent token")
            if side > limit:
                raise ValueError(f"image {name} {side} exceeds the model's position table: max_latent_size allows {limit} pixels")
        return height // stride, width // stride

    def latent_position_ids(self, rows: int, columns: int) -> Tensor:
        """Return the position ids [rows * columns] of a picture's latent tokens."""
        ids = grid_position_ids(rows, columns, self.arch.max_latent_size, self.arch.interpolate_pos)
        return torch.from_numpy(ids).to(self.device)

    def need_autoencoder(self) -> AutoEncoder:
        """Return the autoencoder. Raises ValueError if the model has none."""
        if self.autoencoder is None:
            raise ValueError("this model has no autoencoder (visual_gen off): it can neither draw nor edit; use --task understand")
        return self.autoencoder

    # ------------------------------------------------------------------ inside
    def _grid(self, cells: Sequence[int]) -> Tensor:
        rows, columns = (int(side) // self.arch.latent_patch_size for side in cells)
        pixels = self.arch.vae_token_pixels
        self.latent_grid(rows * pixels, columns * pixels)
        return self.latent_position_ids(rows, columns)

    def _embed_ids(self, ids: Sequence[int]) -> Tensor:
        return self.decoder.embed_text(torch.tensor(list(ids), dtype=torch.long, device=self.device))

    def _borders(self) -> Tensor:
        """Return the embeddings [2, hidden] of the tokens before and after an image."""
        return self._embed_ids([self.tokenizer.start_of_image, self.tokenizer.end_of_image])

    def _run(self, rows: Sequence[PassRow], causal: bool, keep: bool) -> tuple[Tensor, list[Context]]:
        """Run one pass; return hidden states [tokens, hidden] after the final norms (und of all rows first) and the new contexts."""
        attention = CachedAttention([NewTokens(row.context, len(row.und), row.n_gen) for row in rows], causal, keep)
        gen = [row.gen for row in rows if row.gen is not None]
        hidden = torch.cat([row.und for row in rows] + gen)
        positions = [row.positions() for row in rows]
        position_ids = torch.cat([p[0] for p in positions] + [p[1] for p in positions]).to(self.device)
        hidden = self.decoder.run_decoder(hidden, sum(len(row.und) for row in rows), position_ids, attention)
        if not keep:
            return hidden, [row.context for row in rows]
        extended = [row.context.advanced(attention.caches_of(i), len(row.und) + row.n_gen, row.advance()) for i, row in enumerate(rows)]
        return hidden, extended
