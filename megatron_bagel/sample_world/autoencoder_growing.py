# SPDX-License-Identifier: Apache-2.0
"""Grows a FLUX-shaped autoencoder level by level, so that minutes on a laptop suffice instead of hours.

A new autoencoder of full depth must learn colours, positions and edges at once, and pays for the finest level in every step. Here the
innermost two levels learn pictures shrunk by 4 (a sixteenth of the work). Then a finer level is added around them. At first it only
averages pixels on the way in and interpolates on the way out, so each model starts from what the last one learned. All levels have the
same width, so that the new one fits around any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_blocks import AttentionBlock, ResnetBlock
from megatron_bagel.platform.groupwise_optimizer import GroupwiseOptimizer
from megatron_bagel.sample_world.autoencoder_training import quiet_posterior

# Coefficients of the quintic Newton-Schulz iteration that drives singular values towards 1 (K. Jordan's Muon, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Orthogonal steps have a fixed size, so their rate has another scale than Adam's.
ORTHOGONAL_LR_FACTOR = 10.0


class OrthogonalMomentum(GroupwiseOptimizer):
    """Momentum that replaces the update of each convolution, seen as a matrix [out, in*k*k], by the nearest orthogonal one.

    On the small autoencoder it needs about a third of AdamW's steps for the same reconstruction.
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of ``group`` that have a gradient."""
        for param in group["params"]:
            if param.grad is None:
                continue
            buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
            buffer.mul_(group["momentum"]).add_(param.grad)
            update = orthogonalised((param.grad + group["momentum"] * buffer).flatten(1))
            param.add_(update.view_as(param), alpha=-group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the matrix [m, n] with its singular values moved to about 1 (0.7 to 1.2)."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def optimizers_of(model: AutoEncoder, lr: float) -> list[torch.optim.Optimizer]:
    """Return orthogonal momentum for the convolutions between features, and Adam for pixels in and out, norms and biases."""
    inner_parameters = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) > model.arch.in_channels]
    inner_ids = {id(p) for p in inner_parameters}
    other_parameters = [p for p in model.parameters() if id(p) not in inner_ids]
    orthogonal = OrthogonalMomentum([{"params": inner_parameters, "lr_factor": ORTHOGONAL_LR_FACTOR}], lr=lr)
    return [orthogonal, torch.optim.Adam(other_parameters, lr=lr, betas=(0.9, 0.99))]


def seed_autoencoder(arch: AutoencoderArch, generator: torch.Generator) -> AutoEncoder:
    """Build the innermost two levels of ``arch`` with fresh weights and silent residual branches, so that signals pass at once.

    Raises ValueError if the levels of ``arch`` differ in width.
    """
    if set(arch.ch_mult) != {1} or len(arch.ch_mult) < 2:
        raise ValueError(f"only an autoencoder of two or more levels of one width can grow: ch_mult must be 1s, not {list(arch.ch_mult)}")
    model = AutoEncoder(replace(arch, ch_mult=(1, 1)))
    for name, weight in model.named_parameters():
        if weight.ndim == 4:
            _normal(weight, 1 / math.sqrt(weight[0].numel()), generator)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    with torch.no_grad():
        # The convolution works pixel by pixel, so that ``grow`` can fold it into the strided convolution of the next level.
        entry = model.encoder.conv_in.weight
        _normal(entry, 1 / math.sqrt(arch.in_channels), generator)
        entry[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    _silence(model)
    quiet_posterior(model)
    return model


@torch.no_grad()
def grow(model: AutoEncoder, generator: torch.Generator) -> AutoEncoder:
    """Return a model with one finer level around ``model``, for pictures twice as large.

    At first it codes them as ``model`` codes their shrunk versions. On the way in, pixels pass unchanged and are then averaged 2 x 2
    into what the old first convolution saw at one pixel. On the way out, features are interpolated (binomial kernel after pixel
    repetition) and then go through the old last layers.
    """
    grown = AutoEncoder(replace(model.arch, ch_mult=(*model.arch.ch_mult, 1)))
    for weight in grown.parameters():
        if weight.ndim == 4:
            _normal(weight, 1 / math.sqrt(weight[0].numel()), generator)
    _silence(grown)
    tensors = grown.state_dict()
    renamed_tensors = _one_level_deeper(model.state_dict())
    tensors.update({name: tensor.clone() for name, tensor in renamed_tensors if not name.startswith("encoder.conv_in")})
    ch, colours = model.arch.ch, model.arch.in_channels
    carry = torch.linalg.qr(torch.randn(ch, ch, generator=generator))[0][:, :colours]
    tensors["encoder.conv_in.weight"] = torch.zeros(ch, colours, 3, 3)
    tensors["encoder.conv_in.weight"][:, :, 1, 1] = carry
    tensors["encoder.conv_in.bias"] = torch.zeros(ch)
    first_response = model.encoder.conv_in.weight.sum(dim=(2, 3)) @ carry.T
    average = torch.zeros(ch, ch, 3, 3)
    average[:, :, :2, :2] = first_response[:, :, None, None] / 4
    tensors["encoder.down.0.downsample.conv.weight"] = average
    tensors["encoder.down.0.downsample.conv.bias"] = model.encoder.get_parameter("conv_in.bias").clone()
    binomial = torch.tensor([0.25, 0.5, 0.25])
    tensors["decoder.up.1.upsample.conv.weight"] = torch.eye(ch)[:, :, None, None] * torch.outer(binomial, binomial)
    tensors["decoder.up.1.upsample.conv.bias"] = torch.zeros(ch)
    grown.load_state_dict(tensors)
    return grown


def _one_level_deeper(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with every old level's number raised by one, because levels are numbered from the finest."""
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] in ("down", "up"):
            parts[2] = str(int(parts[2]) + 1)
        yield ".".join(parts), tensor


@torch.no_grad()
def _silence(model: AutoEncoder) -> None:
    """Make every residual branch of the model add nothing at first."""
    for module in model.modules():
        last_layer = {ResnetBlock: "conv2", AttentionBlock: "proj_out"}.get(type(module))
        if last_layer is not None:
            nn.init.zeros_(getattr(module, last_layer).weight)
            nn.init.zeros_(getattr(module, last_layer).bias)


@torch.no_grad()
def _normal(weight: Tensor, deviation: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
