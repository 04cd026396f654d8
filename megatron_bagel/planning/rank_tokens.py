# SPDX-License-Identifier: Apache-2.0
"""Reads the sizes of one pack on one rank, which memory and traffic depend on, from the layout that training would make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.cp_partition import concatenated, context_orders, padded_length
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.pack import Pack, PackImage
from megatron_bagel.layout.sdpa_batches import batch_documents


@dataclass(frozen=True)
class RankTokens:
    """Sizes of one pack on one context-parallel rank.

    Attributes:
        slots: Slots including padding.
        text, vit, gen: Tokens by kind; ``gen`` are those of the generation expert.
        ce, mse: Tokens with a text loss and with a velocity loss.
        timesteps: The number of distinct timesteps in the pack.
        keys: The tokens whose keys the rank works with.
        pack_tokens: All tokens of the pack.
        documents: The batches of SDPA as (samples, queries, keys).
        images: The images of the whole pack.
    """

    slots: int
    text: int
    vit: int
    gen: int
    ce: int
    mse: int
    timesteps: int
    keys: int
    pack_tokens: int
    documents: tuple[tuple[int, int, int], ...]
    images: tuple[PackImage, ...] = ()

    @property
    def und(self) -> int:
        """Return the tokens of the understanding expert."""
        return self.text + self.vit

    @property
    def num_tokens(self) -> int:
        """Return the tokens without padding."""
        return self.text + self.vit + self.gen


def rank_tokens(pack: Pack, rank: int, ranks: int, capacity: int | None = None, multiple: int = 1, all_to_all: bool = False) -> RankTokens:
    """Return the sizes of ``pack`` on a context-parallel rank.

    Args:
        pack: The layout of the pack.
        rank: The context-parallel rank.
        ranks: The number of context-parallel ranks.
        capacity: The tokens that slots are padded for, as by ``StepSettings.slots``; None for those of the pack.
        multiple: The number that divides the slots.
        all_to_all: Whether context-parallel ranks exchange by all-to-all.
    """
    length = padded_length(pack.sequence_length if capacity is None else capacity, ranks, multiple)
    orders = context_orders(pack, ranks, length)
    order, pack_order = orders[rank], concatenated(orders)
    loss_slots = [order.slots[positions] for positions in (pack.ce_positions, pack.mse_positions)]
    ce, mse = (int((slots >= 0).sum()) for slots in loss_slots)
    return RankTokens(
        slots=length,
        text=len(order.text_rows),
        vit=len(order.vit_rows),
        gen=len(order.vae_rows),
        ce=ce,
        mse=mse,
        timesteps=sum(image.noised for image in pack.images) + any(image.kind == "vae" and not image.noised for image in pack.images),
        keys=len(pack_order.positions),
        pack_tokens=pack.sequence_length,
        documents=_documents(PackMask.of(pack), pack_order if all_to_all and ranks > 1 else order),
        images=pack.images,
    )


def _documents(mask: PackMask, order: TokenOrder) -> tuple[tuple[int, int, int], ...]:
    """Return the sizes of the batches that ``layout.sdpa_batches.build_sdpa_batches`` makes of a rank's queries, without dense masks."""
    ends = np.cumsum(mask.sample_lens)
    counts = np.bincount(np.searchsorted(ends, order.positions, side="right"), minlength=len(mask.sample_lens))
    samples = np.flatnonzero(counts)
    queries, keys = counts[samples], mask.sample_lens[samples]
    return tuple((len(batch), int(queries[batch].max()), int(keys[batch].max())) for batch in batch_documents(queries, keys))


def largest(tokens: Sequence[RankTokens]) -> RankTokens:
    """Return the pack that needs most memory: the one with the most tokens."""
    return max(tokens, key=lambda pack: (pack.num_tokens, pack.ce))
