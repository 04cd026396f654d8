# SPDX-License-Identifier: Apache-2.0
"""A rotary vision tower's tables are written as the original's buffers, and are those that training here computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.rotary_tables import rotary_table
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.encoders.siglip import rope_2d
from tests.checkpoint.hf.exported import export
from tests.checkpoint.parameter_tree import model_like

PREFIX = "vit_model.vision_model.rope."


def test_the_tables_are_written_and_recomputed_on_the_way_in(goldens: Path, tmp_path: Path) -> None:
    arch = replace(HFFolder(goldens / "hf").arch, vit_rope=True)
    out = export(goldens, tmp_path / "out", arch=arch)
    written = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(out / "ema.safetensors").items() if name.startswith(PREFIX)}
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in written.items()} == {
        name: ((256, 8), torch.float32) for name in ("cos_h", "sin_h", "cos_w", "sin_w")
    }
    cos, sin = (part[:, 0] for part in rope_2d(torch.arange(256), 16, 16))
    for axis, name in enumerate("hw"):
        assert torch.equal(written[f"cos_{name}"], cos[:, axis].repeat(1, 2))
        assert torch.equal(written[f"sin_{name}"], sin[:, axis].repeat(1, 2))
    weight_map = WeightMap(HFFolder(out).arch)
    report = load_weights(HFFolder(out).weights(), weight_map, model_like(weight_map))
    assert {PREFIX + name for name in written} < set(report.recomputed)


def test_a_table_is_that_of_its_grid(goldens: Path) -> None:
    tables = WeightMap(replace(HFFolder(goldens / "hf").arch, vit_rope=True)).tables
    by_row = rotary_table(tables[PREFIX + "sin_h"])
    assert torch.equal(by_row[:16], torch.zeros(16, 8)) and torch.equal(by_row[16], by_row[31]) and by_row[16, 0] == torch.tensor(1.0).sin()
    assert not any(table.rotary for table in WeightMap(HFFolder(goldens / "hf").arch).tables.values())
