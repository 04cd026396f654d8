# SPDX-License-Identifier: Apache-2.0
"""Draws ``loss.png``, the curves of a run, from ``metrics.jsonl`` alone, so that it can be drawn at any time and after a crash."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

PANELS = (("mse", "MSE"), ("ce", "CE"), ("grad_norm", "gradient norm"), ("lr", "learning rate"))


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the trailing mean over up to ``window`` finite values, or NaN if there is none."""
    means: list[float] = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def plot_losses(history: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw both losses, gradient norm and learning rate over the steps. Raises ValueError if there is nothing to draw."""
    if not history:
        raise ValueError("metrics.jsonl has no record yet, so there is no curve to draw")
    # Imported here because matplotlib takes a second, and only rank 0 draws, once. Agg needs no display and no pyplot state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [record["step"] for record in history]
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        values = [math.nan if record.get(key) is None else float(record[key]) for record in history]
        axes.plot(steps, values, color="tab:blue", alpha=0.35 if key != "lr" else 1.0, linewidth=1.0)
        if key != "lr":
            axes.plot(steps, smoothed(values, max(1, len(values) // 20)), color="tab:blue", linewidth=1.6)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
