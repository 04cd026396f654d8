"""Expert-sorted order: where each token of a pack lies on a rank, decided once so that every layer only slices.

A rank holds its tokens as [text | ViT | VAE | padding]: the understanding expert's tokens first, then the generation
expert's. All later bookkeeping (losses, positions, attention) is done in these slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.pack import Pack


@dataclass(frozen=True)
class TokenOrder:
    """Order of one rank's tokens.

    ``positions`` [n_text + n_vit + n_vae] are the places in the sequence, slot by slot; ``length`` is the padded number of
    slots; ``slots`` [sequence_length] is the inverse, -1 for tokens held elsewhere. ``text_rows``, ``vit_rows`` and
    ``vae_rows`` index the pack's own lists of text, ViT and VAE tokens.
    """

    positions: np.ndarray
    slots: np.ndarray
    length: int
    text_rows: np.ndarray
    vit_rows: np.ndarray
    vae_rows: np.ndarray

    @property
    def n_und(self) -> int:
        """Tokens of the understanding expert."""
        return len(self.text_rows) + len(self.vit_rows)

    @property
    def n_gen(self) -> int:
        """Tokens of the generation expert."""
        return len(self.vae_rows)


def expert_order(pack: Pack, keep: np.ndarray | None = None, length: int | None = None) -> TokenOrder:
    """Sort the tokens of a pack (those where boolean ``keep`` [sequence_length] holds) by expert.

    ``length`` pads the slots; raises ValueError when the tokens do not fit.
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
