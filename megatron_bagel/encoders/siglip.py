# SPDX-License-Identifier: Apache-2.0
"""SigLIP for packed images of any size: one matrix product per weight for all images, attention only inside each image.

Parameter names are those of the released files (``vision_model....``). The patch embedding is a Linear over a patch flattened as
(row, column, channel). SigLIP's files store it as a convolution, which is converted when weights are imported. The last layers
that ``vit_select_layer`` leaves out are not built, but the norm behind the stack still applies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_bagel.config.architecture import ViTArch
from megatron_bagel.encoders.size_buckets import SizeBuckets
from megatron_bagel.platform.device import to_device

ROPE_THETA = 10000.0


def rope_2d(position_ids: Tensor, side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [n, 1, 2, head_dim/4] of the optional 2-D rotary positions; the third axis is (row, column).

    ``position_ids`` [n] are row * side + column. Frequencies are 10000^(-2i / (head_dim/2)), computed in fp32 on
    the CPU as in the original: another device's power function rounds differently.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device="cpu") / (head_dim // 2)
    row_and_column = torch.stack([position_ids // side, position_ids % side], dim=1).float()
    angles = row_and_column[:, None, :, None] * to_device(1.0 / ROPE_THETA**exponents, position_ids.device)
    return angles.cos(), angles.sin()


def rotate_2d(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [n, heads, head_dim] in half-split pairs: the first half of the channels by row, the second by column."""
    cos, sin = (part.to(x.dtype) for part in rope)
    first_half, second_half = x.view(*x.shape[:2], 2, 2, x.shape[2] // 4).unbind(dim=3)
    return torch.stack([first_half * cos - second_half * sin, second_half * cos + first_half * sin], dim=3).reshape(x.shape)


class SiglipAttention(nn.Module):
    """Full attention inside each image, on tokens [n, hidden] in bucket order."""

    def __init__(self, arch: ViTArch) -> None:
        super().__init__()
        self.heads, self.head_dim = arch.num_attention_heads, arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, arch.hidden_size)
        self.k_proj = nn.Linear(arch.hidden_size, arch.hidden_size)
        self.v_proj = nn.Linear(arch.hidden_size, arch.hidden_size)
        self.out_proj = nn.Linear(arch.hidden_size, arch.hidden_size)

    def forward(self, x: Tensor, buckets: SizeBuckets, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map tokens [n, hidden], in the order of ``groups``, to the same shape."""
        n, hidden = x.shape
        q, k, v = (layer(x).view(n, self.heads, self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = rotate_2d(q, rope), rotate_2d(k, rope)
        if not buckets.buckets:
            # Without images every weight still gets a (zero) gradient, because data parallelism waits for it.
            return self.out_proj((q + k + v).view(n, hidden))
        runs = zip(buckets.buckets, *(part.split(buckets.run_lengths) for part in (q, k, v)), strict=True)
        outputs = [self._attend(images, length, *qkv) for (images, length), *qkv in runs]
        return self.out_proj((outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(n, hidden))

    def _attend(self, images: int, length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.view(images, length, self.heads, self.head_dim).transpose(1, 2) for part in (q, k, v))
        output = F.scaled_dot_product_attention(q, k, v)
        return output.transpose(1, 2).reshape(images * length, self.heads, self.head_dim)


class SiglipMLP(nn.Module):
    """The MLP of a layer: Linear, tanh-GELU, Linear."""

    def __init__(self, arch: ViTArch) -> None:
        super().__init__()
        self.fc1 = nn.Linear(arch.hidden_size, arch.intermediate_size)
        self.fc2 = nn.Linear(arch.intermediate_size, arch.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, hidden] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, arch: ViTArch) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(arch.hidden_size, eps=arch.layer_norm_eps)
        self.self_attn = SiglipAttention(arch)
        self.layer_norm2 = nn.LayerNorm(arch.hidden_size, eps=arch.layer_norm_eps)
        self.mlp = SiglipMLP(arch)

    def forward(self, x: Tensor, buckets: SizeBuckets, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map tokens [n, hidden], in the order of ``groups``, to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x), buckets, rope)
        return x + self.mlp(self.layer_norm2(x))


class SiglipEmbeddings(nn.Module):
    """The patch projection plus, without rope, the learned position of each patch."""

    def __init__(self, arch: ViTArch, rope: bool) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(arch.num_channels * arch.patch_size**2, arch.hidden_size)
        self.has_table = not rope
        if self.has_table:
            self.position_embedding = nn.Embedding(arch.num_positions, arch.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        """Map patches [n, 3 * p * p] at ``position_ids`` [n] to tokens [n, hidden]."""
        embedded = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        return embedded + self.position_embedding(position_ids) if self.has_table else embedded


class SiglipEncoder(nn.Module):
    """The stack of layers. With ``recompute``, a layer keeps only its input and runs again in the backward pass."""

    def __init__(self, arch: ViTArch, num_layers: int, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(arch) for _ in range(num_layers))
        self.recompute = recompute

    def forward(self, x: Tensor, buckets: SizeBuckets, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map tokens [n, hidden], in the order of ``groups``, to the same shape."""
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, buckets, rope, use_reentrant=False)
            else:
                x = layer(x, buckets, rope)
        return x


class SiglipTransformer(nn.Module):
    """Embeddings, layers and the final norm, on tokens in bucket order."""

    def __init__(self, arch: ViTArch, num_layers: int, rope: bool, side: int, recompute: bool) -> None:
        super().__init__()
        if rope and arch.head_dim % 4:
            raise ValueError(f"vit_rope needs a ViT head size that is a multiple of 4, got {arch.head_dim} (hidden_size / heads)")
        self.embeddings = SiglipEmbeddings(arch, rope)
        self.encoder = SiglipEncoder(arch, num_layers, recompute)
        self.post_layernorm = nn.LayerNorm(arch.hidden_size, eps=arch.layer_norm_eps)
        self.rope, self.side, self.head_dim = rope, side, arch.head_dim

    def forward(self, patches: Tensor, position_ids: Tensor, buckets: SizeBuckets) -> Tensor:
        """Map patches [n, 3 * p * p] at ``position_ids`` [n], in the order of ``groups``, to features [n, hidden]."""
        rope = rope_2d(position_ids, self.side, self.head_dim) if self.rope else None
        return self.post_layernorm(self.encoder(self.embeddings(patches, position_ids), buckets, rope))


class SiglipModel(nn.Module):
    """The transformer under the name ``vision_model``, as in the released files."""

    def __init__(self, arch: ViTArch, num_layers: int, rope: bool, side: int, recompute: bool = False) -> None:
        super().__init__()
        self.vision_model = SiglipTransformer(arch, num_layers, rope, side, recompute)

    def forward(self, patches: Tensor, position_ids: Tensor, buckets: SizeBuckets) -> Tensor:
        """Encode patches [n, 3*p*p] with ids [n], both in bucket order, as features [n, hidden]."""
        return self.vision_model(patches, position_ids, buckets)
