"""Documents of similar length put side by side, so that one attention call serves many of them.

Only tokens of one sample see each other, so a dense [s, s] mask would be mostly empty. Padding a few documents to a common
length costs little arithmetic and saves a kernel launch per document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder


@dataclass(frozen=True)
class AttentionGroup:
    """Some documents, padded to one length: ``slots`` [documents, l] and ``mask`` bool [documents, l, l].

    A padded query sees slot 0 of its row, so that no softmax row is empty; its result is never read.
    """

    slots: np.ndarray
    mask: np.ndarray


# A group may spend this share of its useful area on padding, or this many pairs, whatever is more.
WASTE_SHARE, WASTE_PAIRS = 0.25, 128 * 128


def group_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Partition documents (numbers, longest first) so that padding inside a group stays cheap."""
    groups: list[list[int]] = []
    used = padded = 0
    for document in np.argsort(-lengths, kind="stable"):
        size = int(lengths[document])
        if groups:
            longest = int(lengths[groups[-1][0]])
            new_padded, new_used = padded + longest * longest, used + size * size
            if new_padded - new_used <= max(WASTE_SHARE * new_used, WASTE_PAIRS):
                groups[-1].append(int(document))
                used, padded = new_used, new_padded
                continue
        groups.append([int(document)])
        used = padded = size * size
    return [np.array(group) for group in groups]


def attention_groups(mask: PackMask, order: TokenOrder) -> list[AttentionGroup]:
    """Groups covering every token of a rank that holds whole packs (no context parallelism)."""
    starts = np.cumsum(mask.sample_lens) - mask.sample_lens
    groups = []
    for documents in group_lengths(mask.sample_lens):
        longest = int(mask.sample_lens[documents[0]])
        slots = np.zeros((len(documents), longest), dtype=np.int64)
        allowed = np.zeros((len(documents), longest, longest), dtype=bool)
        allowed[:, :, 0] = True
        for row, document in enumerate(documents):
            size = int(mask.sample_lens[document])
            # Inside a document any order serves; slot order keeps the gather close to sequential.
            places = starts[document] + np.arange(size)
            places = places[np.argsort(order.slots[places])]
            slots[row, :size] = order.slots[places]
            slots[row, size:] = slots[row, 0]
            allowed[row, :size, :size] = mask.allowed(places, places)
        groups.append(AttentionGroup(slots, allowed))
    return groups
