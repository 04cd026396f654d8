# SPDX-License-Identifier: Apache-2.0
"""The layer the expert-sorted one is measured against: tokens stay in sequence order, every part gathers and scatters its rows.

Same mathematics and the same weights as the model's MoT layer, in the plain way: separate q, k, v, gate and up projections, and
for each part an empty result into which both experts' rows are written through index lists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bagel.model.layer import MoTLayer
from megatron_bagel.model.pack_context import AttentionPlan

Rows = tuple[Tensor, Tensor]


class GatherScatterExpert(nn.Module):
    """One expert's weights, cut out of the fused ones of a model layer."""

    def __init__(self, layer: MoTLayer, expert: str) -> None:
        super().__init__()
        attention, mlp = getattr(layer.self_attention, expert), getattr(layer.mlp, expert)
        groups, per_group, dim = attention.groups, attention.heads_per_group, attention.head_dim
        weight = attention.linear_qkv.weight.detach().view(groups, per_group + 2, dim, -1)
        bias = attention.linear_qkv.bias.detach().view(groups, per_group + 2, dim)
        self.head_dim, self.eps = dim, layer.input_layernorm.und.eps
        self.q_proj = _linear(weight[:, :per_group].flatten(0, 2), bias[:, :per_group].flatten())
        self.k_proj = _linear(weight[:, per_group].flatten(0, 1), bias[:, per_group].flatten())
        self.v_proj = _linear(weight[:, per_group + 1].flatten(0, 1), bias[:, per_group + 1].flatten())
        self.o_proj = _linear(attention.linear_proj.weight.detach())
        gate, up = mlp.linear_fc1.weight.detach().chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(mlp.linear_fc2.weight.detach())
        self.q_norm = nn.Parameter(attention.q_layernorm.weight.detach().clone())
        self.k_norm = nn.Parameter(attention.k_layernorm.weight.detach().clone())
        self.input_norm = nn.Parameter(getattr(layer.input_layernorm, expert).weight.detach().clone())
        self.mlp_norm = nn.Parameter(getattr(layer.pre_mlp_layernorm, expert).weight.detach().clone())

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


class GatherScatterLayer(nn.Module):
    """[s, h] in sequence order -> same. ``rows`` are the index lists of understanding and generation tokens."""

    def __init__(self, layer: MoTLayer) -> None:
        super().__init__()
        self.experts = nn.ModuleList(GatherScatterExpert(layer, expert) for expert in ("und", "gen"))

    def route(self, x: Tensor, rows: Rows, part: Callable[[GatherScatterExpert, Tensor], Tensor]) -> Tensor:
        """Each expert's part on its own rows of ``x``, written back to their places."""
        results = [part(expert, x[index]) for expert, index in zip(self.experts, rows, strict=True)]
        out = results[0].new_zeros((x.shape[0], *results[0].shape[1:]))
        for result, index in zip(results, rows, strict=True):
            out[index] = result
        return out

    def forward(self, x: Tensor, rows: Rows, cos: Tensor, sin: Tensor, attention: AttentionPlan) -> Tensor:
        dim = self.experts[0].head_dim
        normed = self.route(x, rows, lambda e, part: e.norm(part, e.input_norm))
        q = self.route(normed, rows, lambda e, part: e.q_proj(part)).unflatten(-1, (-1, dim))
        k = self.route(normed, rows, lambda e, part: e.k_proj(part)).unflatten(-1, (-1, dim))
        v = self.route(normed, rows, lambda e, part: e.v_proj(part)).unflatten(-1, (-1, dim))
        q = self.route(q, rows, lambda e, part: e.norm(part, e.q_norm))
        k = self.route(k, rows, lambda e, part: e.norm(part, e.k_norm))
        mixed = attention.attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, 1)
        x = x + self.route(mixed, rows, lambda e, part: e.o_proj(part))
        normed = self.route(x, rows, lambda e, part: e.norm(part, e.mlp_norm))
        return x + self.route(normed, rows, lambda e, part: e.mlp(part))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary positions on [s, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
