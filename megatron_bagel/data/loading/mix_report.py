# SPDX-License-Identifier: Apache-2.0
"""What the packs of a run consist of: samples, tokens and losses of every dataset, counted in planned packs without reading a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_bagel.data.loading.pack_reader import ReadableSource
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.layout.pack import LayoutSpec, build_pack


@dataclass
class DatasetCounts:
    """Counts of one dataset in some packs. ``ce_tokens`` and ``mse_tokens`` have a loss."""

    samples: int = 0
    images: int = 0
    tokens: int = 0
    ce_tokens: int = 0
    mse_tokens: int = 0


def count_packs(plans: Sequence[PackPlan], sources: Sequence[ReadableSource], spec: LayoutSpec) -> dict[str, DatasetCounts]:
    """Return the counts of every dataset of ``sources`` in planned packs; those that do not occur have zeros."""
    counts = {name: DatasetCounts() for source in sources for name in source.datasets()}
    for plan in plans:
        for source, index, epoch in plan.samples:
            sample = sources[source].sample(index, epoch)
            pack = build_pack([sample], spec)
            dataset = counts[sample.dataset]
            dataset.samples += 1
            dataset.images += len(pack.images)
            dataset.tokens += pack.sequence_length
            dataset.ce_tokens += len(pack.ce_positions)
            dataset.mse_tokens += len(pack.mse_positions)
    return counts


def share_lines(counts: dict[str, DatasetCounts]) -> list[str]:
    """Return a table: the share of every dataset in the samples, images, tokens and losses of the packs."""
    names = [field.name for field in fields(DatasetCounts)]
    totals = {name: sum(getattr(dataset, name) for dataset in counts.values()) for name in names}
    width = max(len(name) for name in (*counts, "all"))
    lines = [f"{'':<{width}} " + " ".join(f"{name.replace('_', ' '):>12}" for name in names)]
    for key, dataset in counts.items():
        shares = [f"{getattr(dataset, name) / totals[name]:.1%}" if totals[name] else "-" for name in names]
        lines.append(f"{key:<{width}} " + " ".join(f"{share:>12}" for share in shares))
    lines.append(f"{'all':<{width}} " + " ".join(f"{totals[name]:>12}" for name in names))
    return lines
