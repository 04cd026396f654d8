# SPDX-License-Identifier: Apache-2.0
"""The goldens' model, written as an exported folder by the package's writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.checkpoint.hf.folder import HFFolder, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.model.positions import sincos_2d


def export(goldens: Path, out: Path, kinds: Sequence[str] = ("ema",), arch: BagelArch | None = None, **options: Any) -> Path:
    """Write the goldens' weights, or random ones for another ``arch``, as a model folder."""
    source = HFFolder(goldens / "hf")
    if arch is None:
        reader, entries = source.weights(), WeightMap(source.arch).entries

        def get(name: str) -> torch.Tensor:
            return entries[name].fuse([reader.get(part) for part in entries[name].hf])

    else:
        entries = WeightMap(arch).entries

        def get(name: str) -> torch.Tensor:
            return torch.randn(entries[name].shape, generator=torch.Generator().manual_seed(list(entries).index(name)))

    files = {kind: WeightFile(get) for kind in kinds}
    return write_folder(out, arch or source.arch, files, sincos_2d, goldens / "hf", goldens / "hf" / "ae.safetensors", **options)
