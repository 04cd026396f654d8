# SPDX-License-Identifier: Apache-2.0
"""Draws the index on disk and who reads which file: ``python docs/figures/index_files.py`` writes ``docs/images/index_files.svg``.

Names of files and columns come from ``megatron_bagel.data.index.format``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from drawing import CLEAN, IMAGES, INK, MUTED, NOISED, PADDING, TEXT, VIT, figure, line, rectangle, text, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron_bagel.data.index.format import MANIFEST, PLANNING_SCHEMA, SHARD_FILES, SKIPPED  # noqa: E402

OUTPUT = IMAGES / "index_files.svg"
WIDTH, HEIGHT = 1160, 530
TOP, ROW = 84, 44
#: What the files of a shard hold, and the readers of each.
CONTENT = {
    "bin": "per sample its texts, then its images",
    "idx": "where each text and image begins in .bin",
    "arrow": "what planning needs, a row per sample",
    "crc": "a checksum of each text and image",
}
READERS = {"planner": ("arrow",), "loader": ("idx", "bin", "crc"), "verify": ("bin", "idx", "arrow", "crc")}
READER_NOTES = {"planner": "every rank, no pixel", "loader": "a rank's own images", "verify": "megatron-bagel data verify"}
EXAMPLE = (("text", TEXT, 90), ("text", TEXT, 60), ("image bytes", CLEAN, 150), ("text", TEXT, 70), ("image bytes", CLEAN, 130))


def tree() -> list[str]:
    """Return the files of an index at the left, with the shard's files in their order."""
    entries = [("index/", 0, ""), (MANIFEST, 1, ""), (SKIPPED, 1, ""), ("t2i_pretrain/t2i/", 1, "")]
    parts, y = [], TOP
    for name, depth, _ in entries:
        parts.append(text(20 + 22 * depth, y, name, 13, bold=name.endswith("/")))
        y += 26
    notes = {1: "written last: schema, sources, counts, checksums", 2: "rows that were left out, and why"}
    return [*parts, *(text(160, TOP + 26 * row, note, 12, MUTED) for row, note in notes.items())]


def shard_top(suffix: str) -> float:
    """Return the upper edge of a file of the shard."""
    return TOP + 112 + ROW * SHARD_FILES.index(suffix)


def shard() -> list[str]:
    """Return the files of one shard, and what each holds."""
    parts = []
    fills = {"bin": CLEAN, "idx": PADDING, "arrow": VIT, "crc": NOISED}
    for suffix in SHARD_FILES:
        y = shard_top(suffix)
        parts += [rectangle(64, y, 560, ROW - 10, fills[suffix], radius=5), text(76, y + 22, f"00000.{suffix}", 13, bold=True)]
        parts.append(text(180, y + 22, CONTENT[suffix], 12))
    return parts


def readers() -> list[str]:
    """Return who reads which file."""
    parts, x = [], 820
    for number, (name, files) in enumerate(READERS.items()):
        y = TOP + 104 + 64 * number
        parts += [rectangle(x, y, 300, 48, "#eef2ff", edge="#6366f1", radius=6), text(x + 16, y + 21, name, 13, bold=True)]
        parts.append(text(x + 16, y + 38, READER_NOTES[name], 12, MUTED))
        parts += [line(628, shard_top(suffix) + 17, x - 6, y + 24, arrow=True) for suffix in files]
    return parts


def inside() -> list[str]:
    """Return what is inside .bin and .arrow."""
    y = TOP + 112 + ROW * len(SHARD_FILES) + 24
    parts, x = [text(20, y + 19, ".bin", 13, bold=True)], 64.0
    for label, fill, width in EXAMPLE:
        parts += [rectangle(x + 1, y, width - 2, 30, fill), text(x + width / 2, y + 20, label, 11, anchor="middle")]
        x += width
    parts += [text(x + 10, y + 20, "… text: int32 token ids; image: the bytes of the source", 12, MUTED)]
    for start, end, label in ((64, 364, "sample 0"), (364, 564, "sample 1")):
        parts += [line(start + 2, y + 36, end - 2, y + 36, INK), text((start + end) / 2, y + 50, label, 11, MUTED, anchor="middle")]
    y += 76
    parts.append(text(20, y + 14, ".arrow", 13, bold=True))
    return [*parts, text(84, y + 14, ", ".join(field.name for field in PLANNING_SCHEMA), 12)]


def svg() -> str:
    """Return the figure."""
    return figure(WIDTH, HEIGHT, "The index on disk, mapped into memory and never loaded whole", [*tree(), *shard(), *readers(), *inside()])


if __name__ == "__main__":
    write(OUTPUT, svg())
