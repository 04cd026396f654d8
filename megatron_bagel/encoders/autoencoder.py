# SPDX-License-Identifier: Apache-2.0
"""The FLUX autoencoder between pixels and latents. It is frozen in training, so here it has to be exact and cheap.

Posterior noise always comes from the caller (keyed by sample). Images are encoded at their own size, because padding them to a
common size would change the latents through GroupNorm, the attention and the borders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder_blocks import Decoder, Encoder
from megatron_bagel.encoders.group_norm import GroupNorm

# Pixels in one batched call of ``encode_many``; the widest activation of the released size (ch 128) then stays within about 0.5 GB.
MAX_PIXELS_PER_CALL = 1 << 20
#: How the encoder computes: as torch does it; with norms whose sums use a whole GPU for one image; with these in channels-last format; and
#: all of it compiled.
VaeKernels = Literal["plain", "split_norm", "channels_last", "compiled"]


class AutoEncoder(nn.Module):
    """FLUX's autoencoder of any width, with the parameter names of the released ``ae.safetensors``.

    It runs in the contiguous memory format unless ``use_kernels`` says otherwise. Images are [b, 3, H, W] in
    [-1, 1] with H and W multiples of ``arch.downsample``; latents are [b, z_channels, H/downsample, W/downsample].
    """

    def __init__(self, arch: AutoencoderArch) -> None:
        super().__init__()
        self.arch = arch
        mult = tuple(arch.ch_mult)
        self.encoder = Encoder(arch.ch, mult, arch.num_res_blocks, arch.in_channels, arch.z_channels)
        self.decoder = Decoder(arch.ch, mult, arch.num_res_blocks, arch.out_ch, arch.z_channels)
        self.memory_format, self.max_pixels_per_call = torch.contiguous_format, MAX_PIXELS_PER_CALL
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def use_kernels(
        self, kernels: VaeKernels, max_pixels_per_call: int = MAX_PIXELS_PER_CALL, backend: str | Callable[..., Any] = "inductor"
    ) -> AutoEncoder:
        """Choose how the encoder computes, and how many pixels of images of one size it takes at a time. The decoder does not change.

        ``backend`` is a backend of ``torch.compile``. Number, height and width of images are variables of what it compiles.
        """
        for module in self.encoder.modules():
            if isinstance(module, GroupNorm):
                module.split = kernels != "plain"
        self.memory_format = torch.channels_last if kernels in ("channels_last", "compiled") else torch.contiguous_format
        self._compiled = torch.compile(self.encoder.forward, backend=backend, dynamic=True) if kernels == "compiled" else None
        for weight in self.encoder.parameters():
            weight.data = weight.data.contiguous(memory_format=self.memory_format if weight.dim() == 4 else torch.contiguous_format)
        self.max_pixels_per_call = max_pixels_per_call
        return self

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unscaled posterior mean and log variance, each [b, z, h, w].

        Raises:
            ValueError: If height or width is not a multiple of the downsampling factor.
        """
        factor = self.arch.downsample
        height, width = images.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"autoencoder: image of {height}x{width} pixels (height x width) is not a multiple of the downsampling factor "
                f"{factor}; set image_stride of the VAE transform to a multiple of {factor}"
            )
        encode = self._compiled or self.encoder
        mean, logvar = encode(images.contiguous(memory_format=self.memory_format)).chunk(2, dim=1)
        return mean, logvar

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Return the model's latent: scale * (mean + exp(logvar / 2) * noise - shift), all [..., z, h, w]; noise is N(0, 1)."""
        return sampled_latent(self.arch, mean, logvar, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents as ``sample`` returns them [b, z, h, w] to images [b, 3, h*downsample, w*downsample], not clamped."""
        z = latents / self.arch.scale_factor + self.arch.shift_factor
        return self.decoder(z)

    def encode_many(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Apply ``encode_moments`` to images [3, H, W] of any sizes, in their order; images of equal size share a call.

        The result of an image does not depend on the other images (up to float rounding of the batched kernels).
        """
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault((image.shape[-2], image.shape[-1]), []).append(i)
        moments: list[tuple[Tensor, Tensor] | None] = [None] * len(images)
        for (height, width), members in by_size.items():
            per_call = max(1, self.max_pixels_per_call // (height * width))
            for start in range(0, len(members), per_call):
                chunk = members[start : start + per_call]
                mean, logvar = self.encode_moments(torch.stack([images[i] for i in chunk]))
                for row, i in enumerate(chunk):
                    moments[i] = (mean[row], logvar[row])
        return [m for m in moments if m is not None]

    def encode_padded(self, images: Sequence[Tensor], size: tuple[int, int] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Encode like ``encode_many``, but with the images padded as in the original, for comparison with it.

        Every image is padded with zeros (mid-grey) on the right and bottom to ``size`` (height and width; default: the largest of
        ``images``), and its moments are cropped from the result. An image's moments then depend on the other images of its pack.
        """
        if not images:
            return []
        height, width = size or (max(image.shape[-2] for image in images), max(image.shape[-1] for image in images))
        padded = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        factor = self.arch.downsample
        crops = [(..., slice(image.shape[-2] // factor), slice(image.shape[-1] // factor)) for image in images]
        return [(mean[crop], logvar[crop]) for (mean, logvar), crop in zip(self.encode_many(padded), crops, strict=True)]


def sampled_latent(arch: AutoencoderArch, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Scale times (mean + exp(logvar / 2) * noise - shift), with the scale and shift of ``arch``; all [..., z, h, w]."""
    return arch.scale_factor * (mean + torch.exp(0.5 * logvar) * noise - arch.shift_factor)
