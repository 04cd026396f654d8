# SPDX-License-Identifier: Apache-2.0
"""Draws how the tokens of a pack are sorted by expert: ``python docs/figures/expert_order.py`` writes ``docs/images/expert_order.svg``.

``megatron_bagel.layout.order`` computes the slots.
"""

from __future__ import annotations

from drawing import CLEAN, IMAGES, MUTED, NOISED, PADDING, TEXT, VIT, figure, legend, line, rectangle, text, write
from example_pack import MAX_NUM_TOKENS, example_pack, token_kinds

from megatron_bagel.layout.order import expert_order

OUTPUT = IMAGES / "expert_order.svg"
CELL, LEFT, BEFORE, AFTER, SIDE = 20, 130, 70, 210, 30
WIDTH, HEIGHT = 1120, 370
KINDS = {"text": TEXT, "vit": VIT, "clean": CLEAN, "noised": NOISED}
PACK = example_pack()
ORDER = expert_order(PACK, length=MAX_NUM_TOKENS)


def token(number: int, y: float, fill: str) -> str:
    """Return the cell of a position or slot."""
    return rectangle(LEFT + number * CELL + 0.5, y, CELL - 1, SIDE, fill)


def tokens() -> list[str]:
    """Return both orders, and a line from each position to its slot."""
    kinds = token_kinds(PACK)
    parts = [
        text(LEFT - 12, BEFORE + 13, "sequence", 12, anchor="end", bold=True),
        text(LEFT - 12, BEFORE + 28, "positions", 12, MUTED, anchor="end"),
        text(LEFT - 12, AFTER + 13, "on a rank", 12, anchor="end", bold=True),
        text(LEFT - 12, AFTER + 28, "slots", 12, MUTED, anchor="end"),
    ]
    for slot, position in enumerate(ORDER.positions):
        fill = KINDS[kinds[position]]
        parts += [token(position, BEFORE, fill), token(slot, AFTER, fill)]
        middle = LEFT + CELL / 2
        parts.append(line(middle + position * CELL, BEFORE + SIDE + 3, middle + slot * CELL, AFTER - 3, fill, 1.5))
    return [*parts, *(token(slot, AFTER, PADDING) for slot in range(len(ORDER.positions), ORDER.length))]


def brace(first: int, last: int, y: float, *labels: str) -> list[str]:
    """Return a line under the slots from ``first`` to before ``last``, and what they are."""
    left, right = LEFT + first * CELL + 2, LEFT + last * CELL - 2
    ends = [line(x, y, x, y - 6, MUTED, 1.5) for x in (left, right)]
    lines = [
        text((left + right) / 2, y + 18 + 16 * number, label, 12, MUTED if number else "#1f2937", "middle")
        for number, label in enumerate(labels)
    ]
    return [line(left, y, right, y, MUTED, 1.5), *ends, *lines]


def experts() -> list[str]:
    """Return which slots each expert works on."""
    und, gen, y = ORDER.n_und, ORDER.n_gen, AFTER + SIDE + 12
    return [
        *brace(0, und, y, f"understanding expert: slots 0 to {und - 1}", "one slice"),
        *brace(und, und + gen, y, f"generation expert: {und} to {und + gen - 1}", "one slice"),
        *brace(und + gen, ORDER.length, y, "padding", f"{und + gen} to {ORDER.length - 1}"),
    ]


def svg() -> str:
    """Return the figure."""
    names = ((TEXT, "text, borders of images"), (VIT, "ViT"), (CLEAN, "clean latent"), (NOISED, "noised latent"), (PADDING, "padding"))
    keys = [part for number, entry in enumerate(names) for part in legend(LEFT + 190 * number, HEIGHT - 24, [entry])]
    return figure(WIDTH, HEIGHT, "Expert-sorted order: sorted once, sliced in every layer", [*tokens(), *experts(), *keys])


if __name__ == "__main__":
    write(OUTPUT, svg())
