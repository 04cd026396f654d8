"""The sizes of one pack on one rank that memory and traffic depend on, read from the layout that training itself would make."""

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
    """One pack on one context-parallel rank: ``slots`` with padding, tokens by kind, loss tokens, distinct ``timesteps``.

    ``documents`` are the batches of SDPA, (samples, queries, keys) each; ``keys`` the tokens whose keys the rank works with;
    ``everyone`` all tokens of the pack; ``images`` those of the whole pack.
    """

    slots: int
    text: int
    vit: int
    gen: int
    ce: int
    mse: int
    timesteps: int
    keys: int
    everyone: int
    documents: tuple[tuple[int, int, int], ...]
    images: tuple[PackImage, ...] = ()

    @property
    def und(self) -> int:
        """Tokens of the understanding expert."""
        return self.text + self.vit

    @property
    def real(self) -> int:
        """Tokens without padding."""
        return self.text + self.vit + self.gen


def rank_tokens(pack: Pack, rank: int, ranks: int, capacity: int | None = None, multiple: int = 1, all_to_all: bool = False) -> RankTokens:
    """``pack`` on context-parallel rank ``rank`` of ``ranks``; slots are padded for ``capacity`` tokens (default: the pack's own) and to
    a ``multiple``, as `StepSettings.slots` does it."""
    length = padded_length(pack.sequence_length if capacity is None else capacity, ranks, multiple)
    orders = context_orders(pack, ranks, length)
    order, whole = orders[rank], concatenated(orders)
    slots = [order.slots[positions] for positions in (pack.ce_positions, pack.mse_positions)]
    ce, mse = (int((held >= 0).sum()) for held in slots)
    return RankTokens(
        slots=length,
        text=len(order.text_rows),
        vit=len(order.vit_rows),
        gen=len(order.vae_rows),
        ce=ce,
        mse=mse,
        timesteps=sum(image.noised for image in pack.images) + any(image.kind == "vae" and not image.noised for image in pack.images),
        keys=len(whole.positions),
        everyone=pack.sequence_length,
        documents=_documents(PackMask.of(pack), whole if all_to_all and ranks > 1 else order),
        images=pack.images,
    )


def _documents(mask: PackMask, order: TokenOrder) -> tuple[tuple[int, int, int], ...]:
    """The batches that ``layout.sdpa_batches.build_sdpa_batches`` makes of a rank's queries, as sizes alone: their masks would be dense."""
    ends = np.cumsum(mask.sample_lens)
    counts = np.bincount(np.searchsorted(ends, order.positions, side="right"), minlength=len(mask.sample_lens))
    present = np.flatnonzero(counts)
    queries, keys = counts[present], mask.sample_lens[present]
    return tuple((len(group), int(queries[group].max()), int(keys[group].max())) for group in batch_documents(queries, keys))


def largest(tokens: Sequence[RankTokens]) -> RankTokens:
    """The pack that asks for most memory, by its real tokens."""
    return max(tokens, key=lambda held: (held.real, held.ce))
