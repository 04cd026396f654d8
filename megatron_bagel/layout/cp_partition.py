"""Which context-parallel rank holds which tokens of a pack: equal counts, equal attention work, and whole blocks where possible.

Keys are exchanged between all ranks of a pack, so any token may be dealt anywhere; only the amount of work per rank counts.
Blocks are cut from the pack's expert-sorted order: a rank's own slots then consist of whole runs of that order, which keeps
FlexAttention's 128 x 128 blocks as full as they are on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import Pack

# Blocks start at FlexAttention's block side and are halved until the work is even enough. Long packs stop at 16 tokens.
LARGEST_BLOCK, MOST_BLOCKS = 128, 2048
EVEN_ENOUGH = 1.03


def padded_length(tokens: int, ranks: int, multiple: int = 1) -> int:
    """Slots per rank for up to ``tokens`` tokens dealt to ``ranks``, a multiple of ``multiple`` (the sequence-parallel ranks)."""
    return -(-tokens // (ranks * multiple)) * multiple


def imbalance(areas: np.ndarray, owners: np.ndarray, ranks: int) -> float:
    """Largest share of the mask area of a rank over the mean; 1 when there is no area."""
    loads = np.bincount(owners, areas, ranks)
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0


def deal(areas: np.ndarray, ranks: int) -> np.ndarray:
    """Owner of every token, int64 [tokens], given its mask area, in the order in which neighbours should stay together.

    Every rank owns tokens // ranks tokens or one more. Raises ValueError unless ``ranks`` is positive.
    """
    if ranks < 1:
        raise ValueError(f"tokens cannot be dealt to {ranks} ranks (--context-parallel-size)")
    block, best, least = LARGEST_BLOCK, np.zeros(len(areas), dtype=np.int64), np.inf
    while block >= 1 and least > EVEN_ENOUGH and ranks > 1:
        owners = _deal_blocks(areas, ranks, block)
        found = imbalance(areas, owners, ranks)
        if found < least:
            best, least = owners, found
        block //= 2
        if block * MOST_BLOCKS < len(areas):
            break
    return best


def _deal_blocks(areas: np.ndarray, ranks: int, block: int) -> np.ndarray:
    """Deal in rounds: every rank gets one block of each round, the heaviest going to the rank with the least work so far.

    What whole rounds leave over is dealt in blocks of half the size, and so on down to single tokens, so counts stay equal.
    """
    owners = np.empty(len(areas), dtype=np.int64)
    loads = np.zeros(ranks)
    first = 0
    while first < len(areas):
        rounds = (len(areas) - first) // (ranks * block)
        if rounds == 0 and block > 1:
            block //= 2
            continue
        count = rounds * ranks if rounds else len(areas) - first
        blocks = areas[first : first + count * block].reshape(count, block).sum(1)
        heaviest = np.argsort(-blocks, kind="stable")
        owner = np.empty(count, dtype=np.int64)
        for start in range(0, count, ranks):
            dealt = heaviest[start : start + ranks]
            takers = np.argsort(loads, kind="stable")[: len(dealt)]
            owner[dealt] = takers
            loads[takers] += blocks[dealt]
        owners[first : first + count * block] = np.repeat(owner, block)
        first += count * block
    return owners


def context_orders(pack: Pack, ranks: int, length: int | None = None, multiple: int = 1) -> list[TokenOrder]:
    """Expert-sorted order of every context-parallel rank; together they hold each token of the pack once.

    All are padded to ``length`` slots (default: what the largest rank needs, a multiple of ``multiple``). Raises ValueError when
    the tokens do not fit.
    """
    if length is None:
        length = padded_length(pack.sequence_length, ranks, multiple)
    if ranks == 1:
        return [expert_order(pack, length=length)]
    whole = expert_order(pack)
    owners = np.empty(pack.sequence_length, dtype=np.int64)
    owners[whole.positions] = deal(PackMask.of(pack).row_areas()[whole.positions], ranks)
    return [expert_order(pack, owners == rank, length) for rank in range(ranks)]


def concatenated(orders: Sequence[TokenOrder]) -> TokenOrder:
    """The tokens of all ranks, rank after rank without padding: how gathered keys lie. Sorted by expert only within a rank."""
    positions = np.concatenate([order.positions for order in orders])
    slots = np.full(len(orders[0].slots), -1, dtype=np.int64)
    slots[positions] = np.arange(len(positions))
    rows = {name: np.concatenate([getattr(order, name) for order in orders]) for name in ("text_rows", "vit_rows", "vae_rows")}
    return replace(orders[0], positions=positions, slots=slots, length=len(positions), **rows)
