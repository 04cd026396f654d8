# SPDX-License-Identifier: Apache-2.0
"""Interleaved rows for tests: random lists of items, and files of rows with their index."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups
from tests.data.index_files import write_lines

VAE = {"image_stride": 16, "max_image_size": 48, "min_image_size": 32}
VIT = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}


def picture(width: int, height: int, colour: str = "red") -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def interleaved_group(root: Path, name: str = "rows", **keys: Any) -> GroupConfig:
    """The group ``interleaved`` with one dataset, whose rows are in ``root/NAME.jsonl`` and its pictures in ``root/images``."""
    settings = {"image_transform_args": VAE, "vit_image_transform_args": VIT, "weight": 1, "dataset_names": [name], **keys}
    if "data_dir" not in settings:
        settings = {**settings, "jsonl_path": [f"{name}.jsonl"], "data_dir": ["images"]}
    return parse_groups({"interleaved": settings}, "test.yaml", root)[0]


def index_rows(root: Path, goldens: Path, rows: list[Any], **keys: Any) -> IndexedSamples:
    """Write rows as JSONL below ``root`` and return their index at ``root/index``."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    write_lines(root / "rows.jsonl", rows)
    build_index([interleaved_group(root, **keys)], goldens / "hf", root / "index", BuildOptions(progress=False))
    return IndexedSamples.open(root / "index")


TEXTS = st.text("abc d", min_size=1, max_size=6).filter(str.strip)
SIZES = st.tuples(st.integers(20, 80), st.integers(20, 80))
NEXT = st.sampled_from([None, None, None, "<|im_start|>", "<|vision_start|>"])


@st.composite
def text_items(draw: st.DrawFn) -> dict[str, Any]:
    """A text with or without loss, alternatives and dropout."""
    item: dict[str, Any] = {"type": "text", "text": draw(st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)))}
    if draw(st.booleans()):
        item["loss"] = True
    else:
        item["droppable"] = draw(st.sampled_from([False, True, 0.0, 0.5, 1.0]))
    return {**item, "next_token": draw(NEXT), "role": draw(st.sampled_from(["none", "system", "user"]))}


@st.composite
def image_items(draw: st.DrawFn) -> dict[str, Any]:
    """A picture that is drawn, seen, or both; now and then a clip of frames."""
    if draw(st.integers(0, 4)) == 0:
        frames = [picture(*draw(SIZES)) for _ in range(draw(st.integers(2, 3)))]
        loss = draw(st.booleans())
        condition = draw(st.sampled_from([["vae"], []])) if loss else ["vae"]
        return {"image": frames, "frame_delta": draw(st.integers(1, 3)), "loss": loss, "condition": condition}
    loss = draw(st.booleans())
    kinds = [["vae"], ["vit"], ["vae", "vit"], None]
    item = {"image": picture(*draw(SIZES)), "loss": loss, "condition": draw(st.sampled_from([*kinds, []] if loss else kinds))}
    return {
        **item,
        "droppable": draw(st.sampled_from([False, True, 0.5, {"vae": 0.3}, {"vit": 1.0, "vae": True}])),
        "next_token": draw(NEXT),
    }


@st.composite
def item_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The items of a sample, of which at least one has a loss."""
    items = draw(st.lists(st.one_of(text_items(), image_items()), min_size=1, max_size=6))
    return [*items, {"text": "end", "role": "assistant"}] if draw(st.booleans()) or not any(item.get("loss") for item in items) else items
