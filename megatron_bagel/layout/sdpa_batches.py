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
    """Some documents, padded to one size: slots of ``queries`` [documents, q] and ``keys`` [documents, k], ``mask`` bool
    [documents, q, k].

    Padding repeats the first slot of its row. A padded query sees that first key, so that no softmax row is empty; its result
    is never read.
    """

    queries: np.ndarray
    keys: np.ndarray
    mask: np.ndarray


# A group may spend this share of its useful area on padding, or this many pairs, whatever is more.
WASTE_SHARE, WASTE_PAIRS = 0.25, 128 * 128


def group_sizes(queries: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Partition documents with so many queries and keys [documents] (numbers, most keys first), so that padding stays cheap."""
    groups: list[list[int]] = []
    used = most_queries = most_keys = 0
    for document in np.lexsort((np.arange(len(keys)), -queries, -keys)):
        rows, columns = int(queries[document]), int(keys[document])
        if groups:
            new_queries, new_used = max(most_queries, rows), used + rows * columns
            padded = (len(groups[-1]) + 1) * new_queries * most_keys
            if padded - new_used <= max(WASTE_SHARE * new_used, WASTE_PAIRS):
                groups[-1].append(int(document))
                used, most_queries = new_used, new_queries
                continue
        groups.append([int(document)])
        used, most_queries, most_keys = rows * columns, rows, columns
    return [np.array(group) for group in groups]


def attention_groups(mask: PackMask, queries: TokenOrder, keys: TokenOrder | None = None) -> list[AttentionGroup]:
    """Groups covering every query token of a rank.

    ``keys`` (the rank's own slots unless given) must hold every token of each document that has a query.
    """
    keys = queries if keys is None else keys
    starts = np.cumsum(mask.sample_lens) - mask.sample_lens
    # Inside a document any order serves; slot order keeps the gathers close to sequential.
    asked = _places(mask, queries, starts)
    present = np.flatnonzero([len(places) for places in asked])
    counts = np.array([len(asked[document]) for document in present], dtype=np.int64)
    groups = []
    for members in group_sizes(counts, mask.sample_lens[present]):
        documents = present[members]
        shape = (len(documents), int(counts[members].max()), int(mask.sample_lens[documents].max()))
        query_slots, key_slots = np.zeros(shape[:2], dtype=np.int64), np.zeros((shape[0], shape[2]), dtype=np.int64)
        allowed = np.zeros(shape, dtype=bool)
        allowed[:, :, 0] = True
        for row, document in enumerate(documents):
            rows = asked[document]
            columns = starts[document] + np.arange(mask.sample_lens[document])
            columns = columns[np.argsort(keys.slots[columns])]
            _fill(query_slots[row], queries.slots[rows])
            _fill(key_slots[row], keys.slots[columns])
            allowed[row, : len(rows), : len(columns)] = mask.allowed(rows, columns)
        groups.append(AttentionGroup(query_slots, key_slots, allowed))
    return groups


def _places(mask: PackMask, order: TokenOrder, starts: np.ndarray) -> list[np.ndarray]:
    """Positions that a rank holds of each document, in slot order."""
    sample = np.searchsorted(starts, order.positions, side="right") - 1
    by_sample = np.argsort(sample, kind="stable")
    ends = np.cumsum(np.bincount(sample, minlength=len(starts)))
    return np.split(order.positions[by_sample], ends[:-1]) if len(starts) else []


def _fill(row: np.ndarray, slots: np.ndarray) -> None:
    row[: len(slots)] = slots
    row[len(slots) :] = slots[0]
