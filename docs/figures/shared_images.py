# SPDX-License-Identifier: Apache-2.0
"""Draws how a replica shares its images: ``python docs/figures/shared_images.py`` writes ``docs/images/shared_images.svg``.

``assign_images`` decides, with the costs of BAGEL-7B-MoT.
"""

from __future__ import annotations

import sys
from pathlib import Path

from drawing import CLEAN, IMAGES, MUTED, VIT, figure, legend, line, rectangle, text, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, PlannedImage, assign_images  # noqa: E402
from megatron_bagel.planning.models import MODELS  # noqa: E402

OUTPUT = IMAGES / "shared_images.svg"
STAGES, TENSOR = 2, 2
WIDTH, HEIGHT = 1180, 430
LEFT, TOP, ROW, BAR, SCALE_WIDTH = 170, 84, 62, 34, 560
#: Kind, sample, picture and tokens of the images of one pack: an edit shows its first picture to both encoders.
IMAGES_OF_PACK = tuple(
    PlannedImage(kind, sample, image, tokens)
    for kind, sample, image, tokens in (
        ("vae", 0, 0, 1024), ("vae", 1, 0, 576), ("vit", 1, 0, 784), ("vae", 1, 1, 576),
        ("vit", 2, 0, 1369), ("vae", 3, 0, 784), ("vit", 4, 0, 576), ("vit", 4, 1, 576),
    )
)  # fmt: skip
COSTS = EncoderCosts.of(MODELS["bagel-7b-mot"])
(OWNERS,) = assign_images([IMAGES_OF_PACK], STAGES * TENSOR, COSTS)


def rank_row(rank: int, unit: float) -> list[str]:
    """Return the images that a rank reads and encodes, as long as their work, and where their features go."""
    stage, y = divmod(rank, TENSOR)[0], TOP + rank * ROW
    parts = [
        text(20, y + 15, f"stage {stage}, tensor {rank % TENSOR}", bold=True),
        text(20, y + 32, f"rank {rank}", 12, MUTED),
        rectangle(LEFT, y, SCALE_WIDTH, BAR, "#f8fafc"),
    ]
    x = float(LEFT)
    for image, owner in zip(IMAGES_OF_PACK, OWNERS, strict=True):
        if owner == rank:
            width = COSTS.image(image) * unit
            parts += [
                rectangle(x + 1, y, width - 2, BAR, VIT if image.kind == "vit" else CLEAN),
                text(x + width / 2, y + 15, f"sample {image.sample}", 11, anchor="middle"),
                text(x + width / 2, y + 28, f"picture {image.image}", 11, MUTED, anchor="middle"),
            ]
            x += width
    return parts


def destinations() -> list[str]:
    """Return where the features go: those of the ViT to the first stage, latents to the first and the last."""
    x, boxes = LEFT + SCALE_WIDTH + 190, []
    for stage, (name, what) in enumerate(
        (("first stage", "ViT features and latents: input"), ("last stage", "latents: targets of the loss"))
    ):
        y = TOP + stage * TENSOR * ROW + ROW / 2 - 12
        boxes += [
            rectangle(x, y, 220, 58, "#eef2ff", edge="#6366f1", radius=6),
            text(x + 110, y + 24, name, 13, anchor="middle", bold=True),
        ]
        boxes.append(text(x + 110, y + 43, what, 12, MUTED, anchor="middle"))
        for rank in range(STAGES * TENSOR):
            boxes.append(line(LEFT + SCALE_WIDTH + 8, TOP + rank * ROW + BAR / 2, x - 6, y + 29, arrow=True))
    bottom = TOP + STAGES * TENSOR * ROW
    return [*boxes, text(LEFT + SCALE_WIDTH + 16, bottom + 4, "one exchange for ViT features, one for latents", 12, MUTED)]


def svg() -> str:
    """Return the figure."""
    ranks = range(STAGES * TENSOR)
    works = [sum(COSTS.image(image) for image, owner in zip(IMAGES_OF_PACK, OWNERS, strict=True) if owner == rank) for rank in ranks]
    parts = [part for rank in ranks for part in rank_row(rank, SCALE_WIDTH / max(works))]
    bottom = TOP + len(works) * ROW
    notes = (
        "The longest image goes first, each to the rank with the least work. A rank reads, decodes and encodes only its own images.",
        "A picture that both encoders need stays on one rank and is decoded once. The gradient of a ViT feature goes back the same way.",
    )
    parts += [text(LEFT, 70, "work of encoding →", 12, MUTED), *destinations()]
    parts += [text(LEFT, bottom + 28 + 18 * number, note, 12) for number, note in enumerate(notes)]
    for number, entry in enumerate(((VIT, "encoded by the ViT, with gradients"), (CLEAN, "encoded by the frozen autoencoder"))):
        parts += legend(LEFT + 270 * number, HEIGHT - 18, [entry])
    return figure(WIDTH, HEIGHT, f"How the {len(works)} ranks of a replica share the images of a step", parts)


if __name__ == "__main__":
    write(OUTPUT, svg())
