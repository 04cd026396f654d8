# SPDX-License-Identifier: Apache-2.0
"""The integers by which the index describes the items of an interleaved sample: ``FIELDS`` of them per item, in order.

| field | a text | an image |
| --- | --- | --- |
| kind | 0 | 1 |
| count | its alternatives, one of which is drawn | its frames: 1, or more for a clip |
| flags | LOSS | LOSS: it is drawn; VAE, VIT: it is also, or only, a condition of these kinds |
| drop | whether dropout may remove it | the same for the VAE condition |
| drop_vit | 0 | the same for the ViT condition |
| next_token | 0, or 1 + the position in ``NEXT_TOKENS`` of the token to predict at its end | the same |
| frame_delta | 0 | RoPE positions from a frame of a clip to the next |
| role | position in ``ROLES`` | the same |

A drop code is 0 (never), 1 (with the probability of the flag of its kind), or 2 plus a probability in millionths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

TEXT, IMAGE = 0, 1
LOSS, VAE, VIT = 1, 2, 4
NEVER, BY_FLAG, OWN = 0, 1, 2
ROLES = ("none", "system", "user", "assistant")
NEXT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_MILLION = 1_000_000


@dataclass(frozen=True)
class StoredItem:
    """One item of the structure column, see the module."""

    kind: int
    count: int = 1
    flags: int = 0
    drop: int = NEVER
    drop_vit: int = NEVER
    next_token: int = 0
    frame_delta: int = 0
    role: int = 0

    def has(self, flag: int) -> bool:
        """Return whether a flag is set."""
        return bool(self.flags & flag)

    def numbers(self) -> tuple[int, ...]:
        """Return the integers of the item in the order of the fields."""
        return astuple(self)


FIELDS = len(fields(StoredItem))
KIND, COUNT, FLAGS, DROP, DROP_VIT, NEXT_TOKEN, FRAME_DELTA, ROLE = range(FIELDS)


def stored_items(structure: Sequence[int] | np.ndarray) -> list[StoredItem]:
    """Return the items that a structure column describes."""
    return [StoredItem(*numbers) for numbers in np.asarray(structure, dtype=np.int64).reshape(-1, FIELDS).tolist()]


def drop_code(probability: float | bool) -> int:
    """Return the code of ``droppable``: False, True (the flag's probability), or an own probability from 0 to 1."""
    if isinstance(probability, bool):
        return BY_FLAG if probability else NEVER
    return OWN + round(probability * _MILLION)


def own_probability(code: int) -> float | None:
    """Return the probability that a drop code holds itself, or None if it says "never" or "by flag"."""
    return (code - OWN) / _MILLION if code >= OWN else None


def own_probabilities(codes: np.ndarray) -> np.ndarray:
    """Return ``own_probability`` of codes that hold one, float64; below 0 for the others."""
    return (codes.astype(np.int64) - OWN) / _MILLION


def structure_problem(structure: np.ndarray, texts: int, images: int) -> str | None:
    """Return a sentence if a structure column does not describe ``texts`` texts and ``images`` images, else None."""
    if len(structure) == 0 or len(structure) % FIELDS:
        return f"structure of {len(structure)} numbers, expected {FIELDS} per item"
    items = stored_items(structure)
    for number, item in enumerate(items):
        if problem := _item_problem(item):
            return f"item {number}: {problem}"
    counts = tuple(sum(item.count for item in items if item.kind == kind) for kind in (TEXT, IMAGE))
    if counts != (texts, images):
        return f"the items have {counts[0]} texts and {counts[1]} images, stored are {texts} and {images}"
    return None


def _item_problem(item: StoredItem) -> str | None:
    if item.kind not in (TEXT, IMAGE):
        return f"kind {item.kind} is unknown"
    if item.count < 1 or not 0 <= item.next_token <= len(NEXT_TOKENS) or not 0 <= item.role < len(ROLES):
        return f"a number is out of range ({', '.join(map(str, item.numbers()))})"
    if any(not 0 <= code <= OWN + _MILLION for code in (item.drop, item.drop_vit)):
        return "a dropout probability is out of range"
    if item.kind == TEXT:
        return "a text with the flags of an image" if item.flags & ~LOSS else None
    if not 0 < item.flags < 8:
        return "a picture that is neither drawn nor a condition"
    return "a clip without frame_delta, or with a ViT copy" if item.count > 1 and (not item.frame_delta or item.has(VIT)) else None
