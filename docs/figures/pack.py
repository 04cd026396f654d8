# SPDX-License-Identifier: Apache-2.0
"""Draws a pack with samples, splits, experts, positions, losses and mask: ``python docs/figures/pack.py`` writes ``docs/images/pack.svg``.

``megatron_bagel.layout`` computes all that is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from drawing import CLEAN, GRID, IMAGES, INK, MUTED, NOISED, TEXT, VIT, figure, legend, line, rectangle, text, write
from example_pack import NAMES, example_pack, token_kinds

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask

OUTPUT = IMAGES / "pack.svg"
CELL, LEFT, TOP, ROW = 15, 130, 62, 24
WIDTH, HEIGHT = 1010, 905
KINDS = {"text": TEXT, "vit": VIT, "clean": CLEAN, "noised": NOISED}
MODES = {Mode.CAUSAL: ("causal", "#bfdbfe"), Mode.FULL: ("full", "#fde68a"), Mode.NOISE: ("noise", "#fecaca")}
EXPERTS = {"understanding": "#c7d2fe", "generation": "#fed7aa"}
PACK = example_pack()


def runs(row: int, title: str, lengths: Sequence[int], fills: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return a strip of runs of tokens, each with its label."""
    y, x = TOP + row * ROW, LEFT
    parts = [text(LEFT - 10, y + 14, title, 12, anchor="end", bold=True)]
    for length, fill, label in zip(lengths, fills, labels, strict=True):
        width = length * CELL
        parts += [rectangle(x + 1, y, width - 2, ROW - 5, fill), text(x + width / 2, y + 13.5, label, 11, anchor="middle")]
        x += width
    return parts


def cells(row: int, title: str, fills: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return a strip with one cell per token."""
    y = TOP + row * ROW
    parts = [text(LEFT - 10, y + 14, title, 12, anchor="end", bold=True)]
    for number, (fill, label) in enumerate(zip(fills, labels, strict=True)):
        x = LEFT + number * CELL
        parts.append(rectangle(x + 0.5, y, CELL - 1, ROW - 5, fill))
        if label:
            parts.append(text(x + CELL / 2, y + 13.5, label, 9, anchor="middle"))
    return parts


def strips() -> list[str]:
    """Return what is known of every token, in sequence order."""
    kinds = token_kinds(PACK)
    modes = [MODES[Mode(mode)] for mode in PACK.split_modes]
    experts = ["generation" if kind in ("clean", "noised") else "understanding" for kind in kinds]
    losses = np.full(PACK.sequence_length, "", dtype=object)
    losses[PACK.ce_positions], losses[PACK.mse_positions] = "CE", "MSE"
    dark = {"": "#f8fafc", "CE": "#a5b4fc", "MSE": "#fdba74"}
    return [
        *runs(0, "samples", PACK.sample_lens, ["#e2e8f0"] * len(NAMES), NAMES),
        *runs(1, "splits", PACK.split_lens, [fill for _, fill in modes], [name for name, _ in modes]),
        *cells(2, "tokens", [KINDS[kind] for kind in kinds], [""] * len(kinds)),
        *cells(3, "expert", [EXPERTS[expert] for expert in experts], ["u" if expert == "understanding" else "g" for expert in experts]),
        *cells(4, "RoPE position", ["#f8fafc"] * len(kinds), [str(position) for position in PACK.position_ids]),
        *cells(5, "loss", [dark[loss] for loss in losses], [loss[0] if loss else "" for loss in losses]),
    ]


def mask_cells() -> list[str]:
    """Return the mask: a row per query, a column per key, coloured by the mode of the key's split where the query sees the key."""
    mask, top = PackMask.of(PACK), TOP + 6 * ROW + 14
    visible, modes = mask.dense(), PACK.split_modes[mask.token_splits()]
    side = CELL * PACK.sequence_length
    parts = [rectangle(LEFT, top, side, side, "#f8fafc", edge=GRID, radius=0)]
    for query, key in zip(*np.nonzero(visible), strict=True):
        parts.append(
            rectangle(LEFT + key * CELL + 0.5, top + query * CELL + 0.5, CELL - 1, CELL - 1, MODES[Mode(modes[key])][1], radius=1.5)
        )
    for end in np.cumsum(PACK.sample_lens)[:-1] * CELL:
        parts += [line(LEFT, top + end, LEFT + side, top + end), line(LEFT + end, top, LEFT + end, top + side)]
    parts += [text(LEFT - 10, top + side / 2, "query", 12, anchor="end", bold=True)]
    return [*parts, text(LEFT + side / 2, top + side + 20, "key: a coloured cell is a key that the query sees", 12, MUTED, anchor="middle")]


def meanings() -> list[str]:
    """Return the legend at the right."""
    x = LEFT + CELL * PACK.sequence_length + 24
    kinds = (
        (TEXT, "text, borders of images"),
        (VIT, "ViT (understanding)"),
        (CLEAN, "clean latent (condition)"),
        (NOISED, "noised latent (target)"),
    )
    splits = tuple((fill, f"{name} split") for name, fill in MODES.values())
    experts = tuple((fill, f"{name[0]}: {name} expert") for name, fill in EXPERTS.items())
    losses = (("#a5b4fc", "C: cross entropy"), ("#fdba74", "M: flow matching"))
    parts, y = [], TOP + 14
    for title, entries in (("Tokens", kinds), ("Splits and mask", splits), ("Experts", experts), ("Losses", losses)):
        parts += [text(x, y, title, 12, bold=True), *legend(x, y + 22, entries)]
        y += 22 * len(entries) + 48
    rules = (
        "A token sees the tokens before it",
        "in its sample, and all of its own full",
        "or noise split. Nothing outside of a",
        "noise split sees into it.",
    )
    return [*parts, *(text(x, y + 17 * number, rule, 12, INK) for number, rule in enumerate(rules))]


def svg() -> str:
    """Return the figure."""
    return figure(
        WIDTH, HEIGHT, f"A pack of {len(NAMES)} samples and {PACK.sequence_length} tokens", [*strips(), *mask_cells(), *meanings()]
    )


if __name__ == "__main__":
    write(OUTPUT, svg())
