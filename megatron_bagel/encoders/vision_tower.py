# SPDX-License-Identifier: Apache-2.0
"""The trained half of the image encoder: pixels of packed images in, tokens for the decoder out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.encoders.connector import Connector
from megatron_bagel.encoders.siglip import SiglipModel
from megatron_bagel.encoders.size_buckets import bucket_by_length
from megatron_bagel.model.positions import sincos_2d


class VisionTower(nn.Module):
    """SigLIP, connector and the decoder's position table for ViT tokens. Parameter names are those of the released files.

    ``recompute`` trades time for memory: layers and connector run again in the backward pass.
    """

    vit_pos_embed: Tensor

    def __init__(self, arch: BagelArch, recompute: bool = False) -> None:
        super().__init__()
        if arch.vit is None:
            raise ValueError("vision tower: the model has no ViT (visual_und is off or vit_config.json is missing)")
        side = arch.vit_max_num_patch_per_side
        self.vit_model = SiglipModel(arch.vit, arch.n_vit_layers, arch.vit_rope or arch.vit.rope, side, recompute)
        self.connector = Connector(arch.vit.hidden_size, arch.llm.hidden_size)
        # The size alone determines this table, so checkpoints leave it out; the export writes it for other readers.
        self.register_buffer("vit_pos_embed", sincos_2d(arch.llm.hidden_size, side), persistent=False)
        self.recompute = recompute

    def forward(self, patches: Tensor, position_ids: Tensor, seqlens: Sequence[int]) -> Tensor:
        """Encode packed images as decoder inputs.

        Args:
            patches: Patches flattened as (row, column, channel), one image after the other, [n, 3*p*p].
            position_ids: row * vit_max_num_patch_per_side + column, [n].
            seqlens: The number of tokens of each image. No image ([0, 3*p*p] and []) is valid: the result has no rows, and in
                its backward pass every parameter receives a gradient of zeros.

        Returns:
            connector(ViT(patches)) + position table in the order of ``patches``, [n, llm hidden size].

        Raises:
            ValueError: If the three inputs disagree about the number of tokens.
        """
        lengths = [int(length) for length in seqlens]
        if not sum(lengths) == len(patches) == len(position_ids):
            raise ValueError(
                f"vision tower: image lengths {lengths} sum to {sum(lengths)}, but there are {len(patches)} patches and "
                f"{len(position_ids)} position ids"
            )
        buckets = bucket_by_length(lengths, patches.device)
        if buckets.order is not None:
            patches, position_ids = patches[buckets.order], position_ids[buckets.order]
        features = self.vit_model(patches, position_ids, buckets)
        if self.recompute and torch.is_grad_enabled():
            tokens = checkpoint(self.connector, features, use_reentrant=False)
        else:
            tokens = self.connector(features)
        tokens = tokens + self.vit_pos_embed[position_ids].to(tokens.dtype)
        return tokens if buckets.inverse is None else tokens.index_select(0, buckets.inverse)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set random weights for training from scratch, the same for the same generator.

        SigLIP has Xavier-uniform matrices in the layers, a LeCun-normal patch projection, a position table of deviation
        1/sqrt(hidden), and norms of weight 1. The connector's matrices are uniform in +-1/sqrt(fan-in). Biases are zero.
        """
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind == "bias":
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "position_embedding" in name or "patch_embedding" in name:
                fan = parameter.shape[1]
                parameter.normal_(0.0, 1 / math.sqrt(fan), generator=generator)
            elif name.startswith("connector."):
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                bound = math.sqrt(6 / (parameter.shape[0] + parameter.shape[1]))
                parameter.uniform_(-bound, bound, generator=generator)
