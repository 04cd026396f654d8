# SPDX-License-Identifier: Apache-2.0
"""Draws an index, a sample or a pack without a display: the pictures of the inspector."""

from __future__ import annotations

import io
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_bagel.data.index.reader import DatasetReader
from megatron_bagel.data.inspect.describe import COLUMNS, histograms
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import Pack

MASK_SIDE = 768  # queries and keys of the drawn mask; longer packs show every n-th token
_KINDS = ("text", "ViT", "clean latent", "noised latent")
_KIND_COLOURS = ("#4878d0", "#6acc64", "#ee854a", "#d65f5f")
_MODES = ("causal", "full", "noise")
_MODE_COLOURS = ("#82a6e0", "#f2c57c", "#d65f5f")
_OFF = "#f2f2f2"


def overview_figure(readers: list[DatasetReader]) -> Figure:
    """Draw histograms of text lengths and image sizes, a row of panels per dataset."""
    figure = Figure(figsize=(12, 2.6 * len(readers)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(readers), len(COLUMNS), squeeze=False)
    for reader, row in zip(readers, panels, strict=True):
        for (title, histogram), axes in zip(histograms(reader).items(), row, strict=True):
            bins = histogram.bins()
            axes.bar([str(low) for low, _, _ in bins], [count for _, _, count in bins], width=0.9)
            axes.set_title(f"{reader.name}: {title} (from)", fontsize=9)
            axes.tick_params(labelsize=7)
    return figure


def sample_figure(reader: DatasetReader, index: int, tokenizer: Tokenizer) -> Figure:
    """Draw the pictures of a sample side by side, and its texts below them."""
    record, (path, row) = reader.record(index), reader.source(index)
    texts = [tokenizer.decode(reader.text_ids(index, text).tolist()) for text in range(len(record.text_tokens))]
    words = "\n".join(textwrap.fill(f"text {i}: {text}", 110) for i, text in enumerate(texts))
    count = max(len(record.widths), 1)
    figure = Figure(figsize=(max(8, 3.2 * count), 3.6 + 0.16 * words.count("\n")), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{reader.name} sample {index} ({path}, row {row})", fontsize=9)
    for image, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        axes.axis("off")
        if image < len(record.widths):
            axes.imshow(np.asarray(reader.picture(index, image)))
            axes.set_title(f"image {image}: {record.widths[image]} x {record.heights[image]}", fontsize=8)
    figure.supxlabel(words.replace("$", r"\$"), fontsize=8, ha="left", x=0.02)
    return figure


def pack_figure(plan: PackPlan, pack: Pack) -> Figure:
    """Draw a pack along its tokens: samples, splits, kinds of tokens, experts and losses; below them the attention mask."""
    figure = Figure(figsize=(10, 11.5), layout="constrained")
    FigureCanvasAgg(figure)
    strips = token_strips(pack)
    panels = figure.subplots(len(strips) + 1, 1, gridspec_kw={"height_ratios": [0.35] * len(strips) + [9]})
    for axes, (title, values, names, colours) in zip(panels, strips, strict=False):
        axes.imshow(values[None], aspect="auto", interpolation="nearest", cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_yticks([])
        axes.set_xticks([])
        if names:
            patches = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
            axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    positions = np.unique(np.linspace(0, pack.sequence_length - 1, min(MASK_SIDE, pack.sequence_length)).astype(np.int64))
    end = pack.sequence_length
    panels[-1].imshow(PackMask.of(pack).allowed(positions, positions), cmap="Greys", interpolation="nearest", extent=(0, end, end, 0))
    panels[-1].set_xlabel("key", fontsize=8)
    panels[-1].set_ylabel("query", fontsize=8)
    figure.suptitle(f"pack {plan.number}: {end} tokens, {len(pack.sample_lens)} samples", fontsize=10)
    return figure


def token_strips(pack: Pack) -> list[tuple[str, np.ndarray, tuple[str, ...], tuple[str, ...]]]:
    """Return each strip of the pack's picture: (title, value per token [sequence_length], names of the values, their colours)."""
    mask = PackMask.of(pack)
    kinds = np.zeros(pack.sequence_length, dtype=np.int64)
    kinds[pack.vit_positions], kinds[pack.vae_positions], kinds[pack.mse_positions] = 1, 2, 3
    loss_kinds = np.zeros(pack.sequence_length, dtype=np.int64)
    loss_kinds[pack.ce_positions], loss_kinds[pack.mse_positions] = 1, 2
    return [
        ("samples", mask.token_samples() % 2, (), ("#b0b0b0", "#606060")),
        ("splits", np.repeat(pack.split_modes, pack.split_lens), _MODES, _MODE_COLOURS),
        ("tokens", kinds, _KINDS, _KIND_COLOURS),
        ("expert", (kinds >= 2).astype(np.int64), ("understanding", "generation"), ("#4878d0", "#ee854a")),
        ("learned", loss_kinds, ("no loss", "CE", "MSE"), (_OFF, "#4878d0", "#d65f5f")),
    ]


def as_png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
