# SPDX-License-Identifier: Apache-2.0
"""Documents of similar length in one batch, so that one SDPA call serves many of them.

Only tokens of one sample see each other, so a dense [s, s] mask would be mostly empty. Padding a few documents to a common
length costs little arithmetic and saves a kernel launch per document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder


@dataclass(frozen=True)
class SdpaBatch:
    """Documents padded to one size, for one SDPA call.

    ``queries`` [documents, q] and ``keys`` [documents, k] are slots; ``mask`` is bool [documents, q, k]. Padding repeats the
    first slot of its row. A padded query sees that first key, so that no softmax row is empty; its result is never read.
    """

    queries: np.ndarray
    keys: np.ndarray
    mask: np.ndarray


# A batch may spend this share of its useful area on padding, or this many pairs, whichever is more.
WASTE_SHARE, WASTE_PAIRS = 0.25, 128 * 128


def batch_documents(queries: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Partition documents into batches so that padding stays cheap.

    Args:
        queries: The number of queries of each document, [documents].
        keys: The number of keys of each document, [documents].

    Returns:
        Document numbers per batch, the documents with the most keys first.
    """
    batches: list[list[int]] = []
    used_pairs = max_queries = max_keys = 0
    for document in np.lexsort((np.arange(len(keys)), -queries, -keys)):
        rows, columns = int(queries[document]), int(keys[document])
        if batches:
            new_max_queries, new_pairs = max(max_queries, rows), used_pairs + rows * columns
            padded_pairs = (len(batches[-1]) + 1) * new_max_queries * max_keys
            if padded_pairs - new_pairs <= max(WASTE_SHARE * new_pairs, WASTE_PAIRS):
                batches[-1].append(int(document))
                used_pairs, max_queries = new_pairs, new_max_queries
                continue
        batches.append([int(document)])
        used_pairs, max_queries, max_keys = rows * columns, rows, columns
    return [np.array(batch) for batch in batches]


def build_sdpa_batches(mask: PackMask, queries: TokenOrder, keys: TokenOrder | None = None) -> list[SdpaBatch]:
    """Return batches that cover every query token of a rank.

    Args:
        mask: The mask of the pack.
        queries: The rank's order.
        keys: The order of the keys (default: ``queries``). It must hold every token of each document that has a query.
    """
    keys = queries if keys is None else keys
    starts = np.cumsum(mask.sample_lens) - mask.sample_lens
    # Any order works inside a document; slot order keeps the gathers close to sequential.
    query_positions = _positions_by_document(mask, queries, starts)
    present = np.flatnonzero([len(positions) for positions in query_positions])
    counts = np.array([len(query_positions[document]) for document in present], dtype=np.int64)
    batches = []
    for members in batch_documents(counts, mask.sample_lens[present]):
        documents = present[members]
        shape = (len(documents), int(counts[members].max()), int(mask.sample_lens[documents].max()))
        query_slots, key_slots = np.zeros(shape[:2], dtype=np.int64), np.zeros((shape[0], shape[2]), dtype=np.int64)
        allowed_pairs = np.zeros(shape, dtype=bool)
        allowed_pairs[:, :, 0] = True
        for row, document in enumerate(documents):
            rows = query_positions[document]
            columns = starts[document] + np.arange(mask.sample_lens[document])
            columns = columns[np.argsort(keys.slots[columns])]
            _fill(query_slots[row], queries.slots[rows])
            _fill(key_slots[row], keys.slots[columns])
            allowed_pairs[row, : len(rows), : len(columns)] = mask.allowed(rows, columns)
        batches.append(SdpaBatch(query_slots, key_slots, allowed_pairs))
    return batches


def _positions_by_document(mask: PackMask, order: TokenOrder, starts: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each document that a rank holds, in slot order."""
    sample = np.searchsorted(starts, order.positions, side="right") - 1
    by_sample = np.argsort(sample, kind="stable")
    document_ends = np.cumsum(np.bincount(sample, minlength=len(starts)))
    return np.split(order.positions[by_sample], document_ends[:-1]) if len(starts) else []


def _fill(row: np.ndarray, slots: np.ndarray) -> None:
    row[: len(slots)] = slots
    row[len(slots) :] = slots[0]
