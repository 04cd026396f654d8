# SPDX-License-Identifier: Apache-2.0
"""Small source files of every group, and what an index made of them holds: shared by the tests of the index."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups

SIZES = {"image_stride": 16, "max_image_size": 48, "min_image_size": 32}
DATASETS = {"t2i_pretrain": "t2i", "unified_edit": "edits", "vlm_sft": "chat", "text": "plain"}


def png(number: int, mode: str = "RGB") -> bytes:
    """A picture of a size that tells it from others."""
    buffer = io.BytesIO()
    Image.new(mode, (20 + number, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def noise_png(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A picture that does not compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_t2i(folder: Path, rows: list[tuple[object, object]], name: str = "0000.parquet") -> None:
    """A parquet file of (image, captions) rows in row groups of 3."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image": pa.array([r[0] for r in rows], pa.binary()), "captions": pa.array([r[1] for r in rows], pa.string())}
    pq.write_table(pa.table(columns), folder / name, row_group_size=3)


def write_lines(path: Path, rows: list[object]) -> None:
    """A jsonl file; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def groups_of(root: Path | str, *names: str, **keys: object) -> list[GroupConfig]:
    """The groups ``names``, a dataset each, in the guide's folders below ``root``."""
    content = {
        name: {"dataset_names": [DATASETS[name]], "weight": 1, "image_transform_args": SIZES, "vit_image_transform_args": SIZES, **keys}
        for name in names
    }
    return parse_groups(content, "test.yaml", root, root)


def talk(human: str, answer: str | None = "yes", **keys: object) -> dict:
    """A conversation of one turn each."""
    turns = [{"from": "human", "value": human}] + ([{"from": "gpt", "value": answer}] if answer is not None else [])
    return {"conversations": turns, **keys}


def reasons(index: Path) -> dict[int | None, str]:
    """Row -> why it was left out."""
    return {line["row"]: line["reason"] for line in map(json.loads, (index / "skipped.jsonl").read_text().splitlines())}


def files_of(index: Path) -> dict[str, str]:
    """Path -> sha256 of every file of an index."""
    paths = sorted(path for path in index.rglob("*") if path.is_file())
    return {str(path.relative_to(index)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
