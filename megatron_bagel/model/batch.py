"""One microbatch as the decoder takes it: a rank's tokens in expert-sorted order, with features instead of pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.pack import Pack
from megatron_bagel.model.attention.context_parallel import CPContext, context_plan
from megatron_bagel.model.pack_context import AttentionPlan


@dataclass
class MicroBatch:
    """Slots are [text | ViT | VAE | padding], ``length`` of them.

    ``text_ids`` [n_text]; ``position_ids`` [length] (0 for padding); ``vit_features`` [n_vit, h] or None (connector output with
    its position embedding); ``latents`` and ``noise`` [n_vae, p * p * z]; ``timesteps`` [n_vae] in [0, 1], 0 for clean images;
    ``latent_position_ids`` [n_vae]; ``ce_slots``, ``labels``, ``ce_weights`` [n_ce]; ``mse_slots`` [n_mse] and the rows of
    ``latents`` they belong to, ``mse_rows``; ``ce_samples`` [n_ce] and ``mse_samples`` [n_mse] number the pack's sample of each
    loss token, ``datasets`` names the dataset of each sample. With ``predict`` the model returns what it predicts at these
    tokens, not its losses.
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
    timesteps: torch.Tensor
    latent_position_ids: torch.Tensor
    ce_slots: torch.Tensor
    labels: torch.Tensor
    ce_weights: torch.Tensor
    mse_slots: torch.Tensor
    mse_rows: torch.Tensor
    ce_samples: torch.Tensor
    mse_samples: torch.Tensor
    attention: AttentionPlan
    datasets: tuple[str, ...] = ()
    predict: bool = False

    @property
    def n_und(self) -> int:
        """Tokens of the understanding expert."""
        return self.n_text + self.n_vit


@dataclass
class Features:
    """What the pre-pipeline stage made for a whole pack, in sequence order of its tokens (see MicroBatch for shapes)."""

    vit: torch.Tensor | None
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


def attention_backend(name: str) -> Callable[..., AttentionPlan]:
    """Plan class of backend ``name``: sdpa, flex or dense; ValueError for others."""
    if name == "sdpa":
        from megatron_bagel.model.attention.sdpa import SdpaPlan

        return SdpaPlan
    if name == "flex":
        from megatron_bagel.model.attention.flex import FlexPlan

        return FlexPlan
    if name == "dense":
        from megatron_bagel.model.attention.dense import DensePlan

        return DensePlan
    raise ValueError(f"--attention-backend {name!r} is unknown; use sdpa, flex or dense")


def attention_plan(
    name: str, mask: PackMask, order: TokenOrder, device: torch.device | str, place: CPContext | None = None
) -> AttentionPlan:
    """How the tokens of ``order`` attend on backend ``name``; with ``place``, together with those of the other ranks there."""
    backend = attention_backend(name)
    if place is None or place.size == 1:
        return backend(mask, order, device)
    return context_plan(backend, mask, place, device)


def make_microbatch(
    pack: Pack,
    order: TokenOrder,
    features: Features,
    backend: str = "sdpa",
    device: torch.device | str = "cpu",
    place: CPContext | None = None,
) -> MicroBatch:
    """Put a pack into a rank's order. Losses belong to the rank that holds their token.

    Under context parallelism ``order`` is the rank's own of ``place.orders``. ``features`` are those of the whole pack, of which the
    rank takes its tokens' rows.
    """

    def put(array) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    position_ids = torch.zeros(order.length, dtype=torch.long)
    position_ids[: len(order.positions)] = torch.from_numpy(pack.position_ids[order.positions])
    ce_slots, mse_slots = order.slots[pack.ce_positions], order.slots[pack.mse_positions]
    ce_here, mse_here = ce_slots >= 0, mse_slots >= 0
    vae_rows = put(order.vae_rows)
    return MicroBatch(
        n_text=len(order.text_rows),
        n_vit=len(order.vit_rows),
        n_vae=len(order.vae_rows),
        length=order.length,
        text_ids=put(pack.text_ids[order.text_rows]),
        position_ids=position_ids.to(device),
        vit_features=None if features.vit is None else features.vit.index_select(0, put(order.vit_rows)),
        latents=features.latents.index_select(0, vae_rows),
        noise=features.noise.index_select(0, vae_rows),
        timesteps=features.timesteps.index_select(0, vae_rows),
        latent_position_ids=put(pack.latent_position_ids[order.vae_rows]),
        ce_slots=put(ce_slots[ce_here]),
        labels=put(pack.labels[ce_here]),
        ce_weights=put(pack.ce_weights[ce_here]),
        mse_slots=put(mse_slots[mse_here]),
        mse_rows=put(mse_slots[mse_here] - order.n_und),
        ce_samples=put(pack.sample_numbers(pack.ce_positions[ce_here])),
        mse_samples=put(pack.sample_numbers(pack.mse_positions[mse_here])),
        attention=attention_plan(backend, PackMask.of(pack), order, device, place),
        datasets=tuple(sample.dataset for sample in pack.samples),
    )
