# SPDX-License-Identifier: Apache-2.0
"""Draws ``expert_load.png``: which sparse experts the last logged step used, by layer, and how balance went over the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def plot_expert_load(history: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the records of ``expert_load.jsonl``. Raises ValueError if there is nothing to draw.

    A cell of the left panels is the load of an expert over the mean of its layer; the lines on the right are the largest of them.
    """
    kinds = [key for key, value in history[-1].items() if isinstance(value, dict)] if history else []
    if not kinds:
        raise ValueError("expert_load.jsonl has no record yet, so there is no load to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    for (load_axes, balance_axes), kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        picture = load_axes.imshow(_over_mean(history[-1][kind]["load"]), aspect="auto", vmin=0, vmax=2, cmap="coolwarm")
        figure.colorbar(picture, ax=load_axes, label="load over mean")
        load_axes.set_yticks(range(len(history[-1][kind]["layers"])), history[-1][kind]["layers"])
        load_axes.set_title(f"{kind}, step {history[-1]['step']}")
        load_axes.set_xlabel("expert")
        load_axes.set_ylabel("layer")
        records = [record for record in history if kind in record]
        balance_axes.plot([record["step"] for record in records], [_over_mean(record[kind]["load"]).max(1) for record in records])
        balance_axes.set_title("largest load over mean, by layer")
        balance_axes.set_xlabel("step")
        balance_axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _over_mean(load: Sequence[Sequence[int]]) -> np.ndarray:
    """Return [layers, experts] loads over the mean of their layer; 1 for a layer without a token."""
    counts = np.array(load, dtype=np.float64)
    means = counts.mean(1, keepdims=True)
    return np.divide(counts, means, out=np.ones_like(counts), where=means > 0)
