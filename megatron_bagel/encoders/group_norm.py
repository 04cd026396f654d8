# SPDX-License-Identifier: Apache-2.0
"""Group norm for single large images: the statistics of a group are summed by many blocks of a GPU, in either memory format.

torch's own kernel on a GPU gives each group of an image to one block. A single image has 32 groups, and an H100 has 132
multiprocessors. On a CPU it computes the variance of a channels-last tensor as E[x^2] - E[x]^2, which costs two digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's group norm, or with ``split`` the same by ``split_group_norm``."""

    split = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features [b, c, h, w]."""
        if not self.split:
            return super().forward(x)
        return split_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def split_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise features [b, c, h, w] by mean and variance of each group of channels.

    The result is fp32, as that of torch's group norm under autocast, and has the memory format of ``x``.
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        grouped = x.permute(0, 2, 3, 1).view(batch, height * width, groups, channels // groups)
        variance, mean = torch.var_mean(grouped.float(), dim=(1, 3), correction=0)
    else:
        variance, mean = torch.var_mean(x.reshape(batch, groups, -1).float(), dim=2, correction=0)
    # One multiply-add per element, with a scale and an offset for each channel of each image.
    per_channel = channels // groups
    scale = (variance + eps).rsqrt().repeat_interleave(per_channel, dim=1) * weight
    offset = bias - mean.repeat_interleave(per_channel, dim=1) * scale
    shape = (batch, channels, 1, 1)
    return torch.addcmul(offset.view(shape), x.float(), scale.view(shape))
