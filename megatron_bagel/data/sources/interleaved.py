# SPDX-License-Identifier: Apache-2.0
"""The schema of an interleaved sample: a list of items, texts and pictures in any order, each with what is done with it (docs/data.md).

Every reason names the item. What the index stores of an item is in stored_items.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bagel.data.sources.parse import check_text_size
from megatron_bagel.data.sources.pictures import Pictures
from megatron_bagel.data.sources.records import BadRow, RawSample
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.stored_items import IMAGE, LOSS, NEVER, NEXT_TOKENS, ROLES, TEXT, VAE, VIT, StoredItem, drop_code

MAX_ITEMS = 512  # no pack has a use for more, and planning makes a table as wide as the longest sample
CONDITIONS = {"vae": VAE, "vit": VIT}
_COMMON_KEYS = ("type", "role", "loss", "droppable", "next_token")
ITEM_KEYS = {"text": (*_COMMON_KEYS, "text"), "image": (*_COMMON_KEYS, "image", "condition", "frame_delta")}


def parse_items(items: Any, pictures: Pictures, row_format: RowFormat, rules: RowRules) -> RawSample:
    """Parse the items of a sample. Raises BadRow naming the item and what is wrong with it."""
    if not isinstance(items, list | tuple) or not items:
        raise BadRow("no list of items under 'items'")
    if len(items) > MAX_ITEMS:
        raise BadRow(f"{len(items)} items are above the limit of {MAX_ITEMS}: no pack holds them; cut the sample")
    sample, stored = RawSample([], [], []), []
    for number, item in enumerate(items):
        try:
            stored.append(_parse_item(item, number == len(items) - 1, sample, pictures, row_format))
        except BadRow as error:
            raise BadRow(f"item {number}: {error}") from error
    if not any(item.has(LOSS) or item.next_token for item in stored):
        raise BadRow("no item has a loss, so nothing to learn from")
    check_text_size(sample.texts, rules)
    sample.structure.extend(number for item in stored for number in item.numbers())
    return sample


def _parse_item(item: Any, is_last: bool, sample: RawSample, pictures: Pictures, row_format: RowFormat) -> StoredItem:
    """Return the numbers of an item, and append its texts or pictures to ``sample``."""
    if not isinstance(item, Mapping):
        raise BadRow(f"an object was expected, found {type(item).__name__}")
    item = {key: value for key, value in item.items() if value is not None}  # Arrow writes every key of a struct
    kind = item.get("type", "text" if "text" in item else "image")
    if kind not in ITEM_KEYS:
        raise BadRow(f"type {kind!r} is unknown; use {' or '.join(ITEM_KEYS)}")
    if unknown := sorted(set(item) - set(ITEM_KEYS[kind])):
        raise BadRow(f"key {unknown[0]!r} does not belong to {kind} items; known are {', '.join(ITEM_KEYS[kind])}")
    role = item.get("role", ROLES[0])
    if role not in ROLES:
        raise BadRow(f"role {role!r} is unknown; use one of {', '.join(ROLES)}")
    loss = item.get("loss", role == "assistant")
    if not isinstance(loss, bool):
        raise BadRow(f"loss must be true or false, got {loss!r}")
    next_token = _next_token(item.get("next_token"))
    if kind == "text":
        return _text(item, loss, next_token, ROLES.index(role), sample)
    return _image(item, loss, next_token, role, is_last, sample, pictures, row_format)


def _text(item: Mapping[str, Any], loss: bool, next_token: int, role: int, sample: RawSample) -> StoredItem:
    texts = item.get("text")
    alternatives = [texts] if isinstance(texts, str) else texts
    if not isinstance(alternatives, list) or not all(isinstance(text, str) for text in alternatives):
        raise BadRow("text is neither a string nor a list of alternative strings")
    if not alternatives or not all(text.strip() if loss else text for text in alternatives):
        raise BadRow("a text or one of its alternatives is empty")
    drop = _drop(item.get("droppable", False))
    if loss and drop != NEVER:
        raise BadRow("a text with loss cannot be droppable; only conditions are dropped")
    sample.texts.extend(alternatives)
    return StoredItem(TEXT, len(alternatives), LOSS if loss else 0, drop, NEVER, next_token, 0, role)


def _image(
    item: Mapping[str, Any], loss: bool, next_token: int, role: str, is_last: bool, sample: RawSample, pictures: Pictures,
    row_format: RowFormat,
) -> StoredItem:  # fmt: skip
    frames = _frames(item)
    condition = _condition(item.get("condition"), loss and is_last, len(frames) > 1, row_format)
    if loss and role in ("system", "user") and not condition & VAE:
        raise BadRow(f'a {role}\'s picture with loss needs "vae" in its condition: what a {role} shows is also seen')
    if not loss and not condition:
        raise BadRow('a picture without loss needs a condition: "vae", "vit" or both')
    if (loss or condition & VAE) and not row_format.has_vae:
        raise BadRow("a picture with loss or the condition vae has no transform; give the group image_transform_args")
    if condition & VIT and not row_format.has_vit:
        raise BadRow("a picture with the condition vit has no transform; give the group vit_image_transform_args")
    droppable = item.get("droppable", False)
    by_kind = droppable if isinstance(droppable, Mapping) else dict.fromkeys(CONDITIONS, droppable)
    if unknown := sorted(set(by_kind) - set(CONDITIONS)):
        raise BadRow(f"droppable names the condition {unknown[0]!r}; known are {', '.join(CONDITIONS)}")
    drops = {kind: _drop(by_kind.get(kind) or False) if condition & flag else NEVER for kind, flag in CONDITIONS.items()}
    if len(frames) > 1 and any(drops.values()):
        raise BadRow("a clip cannot be droppable")
    sample.images.extend(pictures.read(frame) for frame in frames)
    flags = condition | (LOSS if loss else 0)
    return StoredItem(
        IMAGE, len(frames), flags, drops["vae"], drops["vit"], next_token, item.get("frame_delta", 0), ROLES.index(role)
    )  # fmt: skip


def _frames(item: Mapping[str, Any]) -> Sequence[Any]:
    """Return the pictures of an image item: one, or the frames of a clip."""
    image, delta = item.get("image"), item.get("frame_delta")
    frames = image if isinstance(image, list) else [image]
    if delta is not None and (isinstance(delta, bool) or not isinstance(delta, int) or delta < 1):
        raise BadRow(f"frame_delta must be a whole number of at least 1, got {delta!r}")
    if not frames or any(frame is None for frame in frames):
        raise BadRow("no picture under 'image'")
    if (len(frames) > 1) != (delta is not None):
        raise BadRow("a list of several frames and frame_delta go together: they make a clip; write pictures as items of their own")
    return frames


def _condition(value: Any, is_last_drawn: bool, is_clip: bool, row_format: RowFormat) -> int:
    """Return the flags of the conditions; the default is every kind that has a transform, and none for a picture drawn last."""
    if value is None:
        possible = (VAE if row_format.has_vae else 0) | (VIT if row_format.has_vit and not is_clip else 0)
        return 0 if is_last_drawn else possible or VIT
    kinds = [value] if isinstance(value, str) else value
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in CONDITIONS for kind in kinds):
        raise BadRow(f"condition {value!r} is unknown; use a list of {' and '.join(CONDITIONS)}, empty for neither")
    if is_clip and "vit" in kinds:
        raise BadRow('a clip has the condition "vae" or none: the vision tower reads single pictures')
    return sum(CONDITIONS[kind] for kind in set(kinds))


def _drop(value: Any) -> int:
    if isinstance(value, bool):
        return drop_code(value)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadRow(f"droppable must be true, false or a probability from 0 to 1, got {value!r}")
    return drop_code(float(value))


def _next_token(value: Any) -> int:
    if value is None:
        return 0
    if value not in NEXT_TOKENS:
        raise BadRow(f"next_token {value!r} is unknown; use one of {', '.join(NEXT_TOKENS)}")
    return NEXT_TOKENS.index(value) + 1
