# SPDX-License-Identifier: Apache-2.0
"""Which context-parallel rank holds which tokens of a pack: equal counts, equal attention work, and full blocks where possible.

All ranks of a pack exchange keys, so any rank may hold any token; only the work per rank matters. Blocks are sliced from the pack's
expert-sorted order. A rank's slots then consist of long runs of that order, which keeps FlexAttention's 128 x 128 blocks as full as
on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import Pack

# Blocks start at FlexAttention's block side and are halved until the work is balanced. Long packs stop at 16 tokens.
LARGEST_BLOCK, MOST_BLOCKS = 128, 2048
EVEN_ENOUGH = 1.03


def padded_length(tokens: int, ranks: int, multiple: int = 1) -> int:
    """Return the slots per rank for up to ``tokens`` tokens on ``ranks`` ranks, a multiple of ``multiple`` (sequence-parallel ranks)."""
    return -(-tokens // (ranks * multiple)) * multiple


def imbalance(areas: np.ndarray, owners: np.ndarray, ranks: int) -> float:
    """Return the largest mask area of a rank over the mean area, or 1 if there is no area."""
    loads = np.bincount(owners, areas, ranks)
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0


def assign_tokens(areas: np.ndarray, ranks: int) -> np.ndarray:
    """Assign tokens to ranks so that counts and mask areas are balanced.

    Args:
        areas: Mask area of every token, in an order in which neighbours should stay together, [tokens].
        ranks: The number of ranks.

    Returns:
        The owner of every token, int64 [tokens]. Every rank owns tokens // ranks tokens or one more.

    Raises:
        ValueError: If ``ranks`` is not positive.
    """
    if ranks < 1:
        raise ValueError(f"tokens cannot be assigned to {ranks} ranks; set --context-parallel-size to 1 or more")
    block, best_owners, least_imbalance = LARGEST_BLOCK, np.zeros(len(areas), dtype=np.int64), np.inf
    while block >= 1 and least_imbalance > EVEN_ENOUGH and ranks > 1:
        owners = _assign_blocks(areas, ranks, block)
        block_imbalance = imbalance(areas, owners, ranks)
        if block_imbalance < least_imbalance:
            best_owners, least_imbalance = owners, block_imbalance
        block //= 2
        if block * MOST_BLOCKS < len(areas):
            break
    return best_owners


def _assign_blocks(areas: np.ndarray, ranks: int, block: int) -> np.ndarray:
    """Assign blocks in rounds: every rank gets one block per round, and the heaviest block goes to the rank with the least work.

    Tokens that do not fill a round are assigned in blocks of half the size, and so on down to single tokens, so counts stay
    equal.
    """
    owners = np.empty(len(areas), dtype=np.int64)
    loads = np.zeros(ranks)
    first_token = 0
    while first_token < len(areas):
        rounds = (len(areas) - first_token) // (ranks * block)
        if rounds == 0 and block > 1:
            block //= 2
            continue
        count = rounds * ranks if rounds else len(areas) - first_token
        blocks = areas[first_token : first_token + count * block].reshape(count, block).sum(1)
        heaviest = np.argsort(-blocks, kind="stable")
        block_owners = np.empty(count, dtype=np.int64)
        for start in range(0, count, ranks):
            round_blocks = heaviest[start : start + ranks]
            round_owners = np.argsort(loads, kind="stable")[: len(round_blocks)]
            block_owners[round_blocks] = round_owners
            loads[round_owners] += blocks[round_blocks]
        owners[first_token : first_token + count * block] = np.repeat(block_owners, block)
        first_token += count * block
    return owners


def context_orders(pack: Pack, ranks: int, length: int | None = None, multiple: int = 1) -> list[TokenOrder]:
    """Return the expert-sorted order of every context-parallel rank; together they hold each token of the pack once.

    Args:
        pack: The pack.
        ranks: The number of context-parallel ranks.
        length: Padded slots per rank (default: the largest rank's tokens, rounded up to ``multiple``).
        multiple: The number of sequence-parallel ranks.

    Raises:
        ValueError: If the tokens of a rank exceed ``length`` slots.
    """
    if length is None:
        length = padded_length(pack.sequence_length, ranks, multiple)
    if ranks == 1:
        return [expert_order(pack, length=length)]
    pack_order = expert_order(pack)
    owners = np.empty(pack.sequence_length, dtype=np.int64)
    owners[pack_order.positions] = assign_tokens(PackMask.of(pack).row_areas()[pack_order.positions], ranks)
    return [expert_order(pack, owners == rank, length) for rank in range(ranks)]


def concatenated(orders: Sequence[TokenOrder]) -> TokenOrder:
    """Return the tokens of all ranks, rank after rank without padding, as gathered keys are. Experts are sorted only within a rank."""
    positions = np.concatenate([order.positions for order in orders])
    slots = np.full(len(orders[0].slots), -1, dtype=np.int64)
    slots[positions] = np.arange(len(positions))
    rows = {name: np.concatenate([getattr(order, name) for order in orders]) for name in ("text_rows", "vit_rows", "vae_rows")}
    return replace(orders[0], positions=positions, slots=slots, length=len(positions), **rows)
