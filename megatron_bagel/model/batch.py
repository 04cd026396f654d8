# SPDX-License-Identifier: Apache-2.0
"""One microbatch in the decoder's form: a rank's tokens in expert-sorted order, with features instead of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.pack import Pack
from megatron_bagel.model.attention.context_parallel import CPContext, context_plan
from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.pack_context import AttentionPlan
from megatron_bagel.platform.device import to_device


@dataclass
class LossTokens:
    """The loss tokens that a rank holds.

    ``ce_slots``, ``labels``, ``ce_weights`` [n_ce]: the tokens of the text loss; ``mse_slots`` [n_mse] and ``mse_rows``, their rows of
    the latents: the tokens of the picture loss; ``ce_samples`` [n_ce] and ``mse_samples`` [n_mse] number the pack's sample of each.
    """

    ce_slots: torch.Tensor
    labels: torch.Tensor
    ce_weights: torch.Tensor
    mse_slots: torch.Tensor
    mse_rows: torch.Tensor
    ce_samples: torch.Tensor
    mse_samples: torch.Tensor


@dataclass
class Times:
    """The timesteps in [0, 1] of a rank's VAE tokens, 0 for clean images.

    ``time_values`` [k] are the distinct ones, ascending, and ``time_rows`` [n_vae] the row of each token's timestep among them. The host
    finds them, because a device would make it wait for their number.
    """

    time_values: torch.Tensor
    time_rows: torch.Tensor

    @classmethod
    def of(cls, timesteps: torch.Tensor, device: torch.device | str) -> Times:
        """Return the times of ``timesteps`` [n_vae], which are on the host, on ``device``."""
        values, rows = np.unique(timesteps.numpy(), return_inverse=True)
        return cls(_tensor(values, device), _tensor(rows, device))

    @property
    def timesteps(self) -> torch.Tensor:
        """Return the timestep of each VAE token [n_vae]."""
        return self.time_values.index_select(0, self.time_rows)


@dataclass
class MicroBatch(LossTokens, Times):
    """The tokens of a rank, in slots [text | ViT | VAE | padding], ``length`` of them.

    ``text_ids`` [n_text]; ``position_ids`` [length] (0 for padding); ``vit_features`` [n_vit, h] or None (connector output with
    its position embedding); ``latents`` and ``noise`` [n_vae, p * p * z]; ``latent_position_ids`` [n_vae]; ``datasets`` names the
    dataset of each sample. With ``predict`` the model returns its predictions at the loss tokens instead of its losses. ``draws`` are
    the random words of the tokens if adapters drop inputs.
    """

    n_text: int
    n_vit: int
    n_vae: int
    length: int
    text_ids: torch.Tensor
    position_ids: torch.Tensor
    vit_features: torch.Tensor | None
    latents: torch.Tensor
    noise: torch.Tensor
    latent_position_ids: torch.Tensor
    attention: AttentionPlan
    datasets: tuple[str, ...] = ()
    predict: bool = False
    draws: Draws | None = None

    @property
    def n_und(self) -> int:
        """Return the number of tokens of the understanding expert."""
        return self.n_text + self.n_vit


@dataclass
class Features:
    """The image encoder's output for a pack, in sequence order of its tokens (``MicroBatch`` gives the shapes).

    ``timesteps`` [n_vae] in [0, 1], 0 for clean images, are on the host: they come from there, and only a rank's own go to its device.
    """

    vit: torch.Tensor | None
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


def attention_backend(name: str) -> Callable[..., AttentionPlan]:
    """Return the plan class of backend ``name``: sdpa, flex, flex_flash, magi or dense. Raises ValueError for any other name."""
    if name == "sdpa":
        from megatron_bagel.model.attention.sdpa import SdpaPlan

        return SdpaPlan
    if name == "flex":
        from megatron_bagel.model.attention.flex import FlexPlan

        return FlexPlan
    if name == "flex_flash":
        from megatron_bagel.model.attention.flex import FlexFlashPlan

        return FlexFlashPlan
    if name == "magi":
        from megatron_bagel.model.attention.magi import MagiPlan

        return MagiPlan
    if name == "dense":
        from megatron_bagel.model.attention.dense import DensePlan

        return DensePlan
    raise ValueError(f"--attention-backend {name!r} is unknown; use sdpa, flex, flex_flash, magi or dense")


def attention_plan(
    name: str, mask: PackMask, order: TokenOrder, device: torch.device | str, cp_context: CPContext | None = None
) -> AttentionPlan:
    """Return how the tokens of ``order`` attend on backend ``name``, with those of the other ranks of ``cp_context`` if given."""
    backend = attention_backend(name)
    if cp_context is None or cp_context.size == 1:
        return backend(mask, order, device)
    return context_plan(backend, mask, cp_context, device)


def make_microbatch(
    pack: Pack,
    order: TokenOrder,
    features: Features,
    backend: str = "sdpa",
    device: torch.device | str = "cpu",
    cp_context: CPContext | None = None,
) -> MicroBatch:
    """Put a pack into a rank's order. A loss belongs to the rank that holds its token.

    Args:
        pack: The pack, in sequence order.
        order: The rank's order; under context parallelism its entry of ``cp_context.orders``.
        features: Features of the full pack, of which the rank takes its tokens' rows.
        backend: The attention backend, by a name of ``attention_backend``.
        device: The device of the result.
        cp_context: The ranks that share the pack, if any.
    """
    position_ids = torch.zeros(order.length, dtype=torch.long)
    position_ids[: len(order.positions)] = torch.from_numpy(pack.position_ids[order.positions])
    vae_rows = _tensor(order.vae_rows, device)
    return MicroBatch(
        n_text=len(order.text_rows),
        n_vit=len(order.vit_rows),
        n_vae=len(order.vae_rows),
        length=order.length,
        text_ids=_tensor(pack.text_ids[order.text_rows], device),
        position_ids=to_device(position_ids, device),
        vit_features=None if features.vit is None else features.vit.index_select(0, _tensor(order.vit_rows, device)),
        latents=features.latents.index_select(0, vae_rows),
        noise=features.noise.index_select(0, vae_rows),
        latent_position_ids=_tensor(pack.latent_position_ids[order.vae_rows], device),
        **vars(Times.of(features.timesteps[torch.from_numpy(order.vae_rows)], device)),
        **vars(_loss_tokens(pack, order, device)),
        attention=attention_plan(backend, PackMask.of(pack), order, device, cp_context),
        datasets=tuple(sample.dataset for sample in pack.samples),
    )


def _loss_tokens(pack: Pack, order: TokenOrder, device: torch.device | str) -> LossTokens:
    """Return the loss tokens that a rank holds."""
    ce_slots, mse_slots = order.slots[pack.ce_positions], order.slots[pack.mse_positions]
    local_ce, local_mse = ce_slots >= 0, mse_slots >= 0
    return LossTokens(
        ce_slots=_tensor(ce_slots[local_ce], device),
        labels=_tensor(pack.labels[local_ce], device),
        ce_weights=_tensor(pack.ce_weights[local_ce], device),
        mse_slots=_tensor(mse_slots[local_mse], device),
        mse_rows=_tensor(mse_slots[local_mse] - order.n_und, device),
        ce_samples=_tensor(pack.sample_numbers(pack.ce_positions[local_ce]), device),
        mse_samples=_tensor(pack.sample_numbers(pack.mse_positions[local_mse]), device),
    )


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return to_device(torch.from_numpy(array), device)
