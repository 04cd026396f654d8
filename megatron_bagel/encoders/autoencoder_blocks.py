# SPDX-License-Identifier: Apache-2.0
"""The parts of the FLUX autoencoder: residual and attention blocks, encoder and decoder, with the released parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bagel.encoders.group_norm import GroupNorm

NORM_GROUPS = 32
NORM_EPS = 1e-6


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def _conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _norm_silu(norm: GroupNorm, x: Tensor) -> Tensor:
    """Return SiLU(GroupNorm(x)). Without gradients the activation overwrites the norm's output, which saves a pass over memory."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _linear_1x1(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a 1x1 convolution to tokens [b, h*w, c] as a matrix product."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class ResnetBlock(nn.Module):
    """norm-silu-conv twice plus a shortcut, a 1x1 convolution if the width changes. Maps [b, c, h, w] to [b, c', h, w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map features [b, c, h, w] to [b, c', h, w]."""
        h = self.conv1(_norm_silu(self.norm1, x))
        h = self.conv2(_norm_silu(self.norm2, h))
        shortcut = self.nin_shortcut(x) if self.has_shortcut else x
        return h.add_(shortcut)


class AttentionBlock(nn.Module):
    """Single-head full attention over the pixels of each image, with a residual, on [b, c, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [b, c, h, w] to the same shape."""
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = (_linear_1x1(layer, tokens).unsqueeze(1) for layer in (self.q, self.k, self.v))
        output = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        output = _linear_1x1(self.proj_out, output)
        return x + output.view(b, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve height and width. Only the right and the bottom have a zero border, as in the released weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [b, c, h, w] to [b, c, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then apply a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [b, c, h, w] to [b, c, 2 h, 2 w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """The bottom of encoder and decoder: residual, attention, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [b, c, h, w] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, followed by a change of resolution except on the last level."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks))
        # The attribute is the parameter name in the released file, so it differs between encoder and decoder.
        if resample == "down":
            self.downsample = Downsample(out_channels)
        elif resample == "up":
            self.upsample = Upsample(out_channels)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """Map features to those of the next level."""
        for block in self.block:
            x = block(x)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else x


class Encoder(nn.Module):
    """Encode images [b, in_channels, H, W] as posterior mean and log variance, concatenated [b, 2*z, H/f, W/f]."""

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, in_channels: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last_level = len(widths) - 1
        self.conv_in = _conv3(in_channels, ch)
        self.down = nn.ModuleList(
            Level(widths[i - 1] if i else ch, widths[i], num_res_blocks, "down" if i < last_level else None) for i in range(len(widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [b, in_channels, H, W] to moments [b, 2 * z, H / f, W / f]."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(_norm_silu(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Decode latents [b, z, h, w] to images [b, out_ch, h*f, w*f]. Level 0 is the finest, and levels run from the last to 0."""

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, out_ch: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last_level = len(widths) - 1
        self.conv_in = _conv3(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last_level)], widths[i], num_res_blocks + 1, "up" if i > 0 else None) for i in range(len(widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], out_ch)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents [b, z, h, w] to images [b, out_ch, h * f, w * f]."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(_norm_silu(self.norm_out, h))
