# SPDX-License-Identifier: Apache-2.0
"""Expert-sorted order: the slot of each token of a pack on a rank, decided once so that every layer only slices.

A rank holds its tokens as [text | ViT | VAE | padding]: the understanding expert's tokens first, then the generation
expert's. Losses, positions and attention all refer to these slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.pack import Pack


@dataclass(frozen=True)
class TokenOrder:
    """Order of one rank's tokens.

    ``positions`` [n_text + n_vit + n_vae] are sequence positions, slot by slot. ``length`` is the padded number of slots.
    ``slots`` [sequence_length] is the inverse of ``positions``, -1 for tokens of other ranks. ``text_rows``, ``vit_rows`` and
    ``vae_rows`` index the pack's lists of text, ViT and VAE tokens.
    """

    positions: np.ndarray
    slots: np.ndarray
    length: int
    text_rows: np.ndarray
    vit_rows: np.ndarray
    vae_rows: np.ndarray

    @property
    def n_und(self) -> int:
        """Return the number of tokens of the understanding expert."""
        return len(self.text_rows) + len(self.vit_rows)

    @property
    def n_gen(self) -> int:
        """Return the number of tokens of the generation expert."""
        return len(self.vae_rows)


def expert_order(pack: Pack, keep: np.ndarray | None = None, length: int | None = None) -> TokenOrder:
    """Sort the tokens of a pack by expert.

    Args:
        pack: The pack.
        keep: Boolean [sequence_length]; only tokens where it is True are included. None includes all.
        length: The padded number of slots; None adds no padding.

    Raises:
        ValueError: If the tokens exceed ``length`` slots.
    """
    rows = []
    for positions in (pack.text_positions, pack.vit_positions, pack.vae_positions):
        rows.append(np.arange(len(positions)) if keep is None else np.flatnonzero(keep[positions]))
    order = np.concatenate([pack.text_positions[rows[0]], pack.vit_positions[rows[1]], pack.vae_positions[rows[2]]])
    if length is None:
        length = len(order)
    if len(order) > length:
        raise ValueError(f"{len(order)} tokens do not fit {length} slots; raise --max_num_tokens")
    slots = np.full(pack.sequence_length, -1, dtype=np.int64)
    slots[order] = np.arange(len(order))
    return TokenOrder(order, slots, length, *rows)
