# SPDX-License-Identifier: Apache-2.0
"""The position table equals the recorded one and keeps its two axes apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bagel.model.positions import sincos_2d


def test_rows_equal_the_recorded_table(goldens: Path) -> None:
    recorded = load_file(goldens / "modules.safetensors")["latent_pos_embed"]
    table = sincos_2d(recorded.shape[1], 16)
    assert torch.equal(table[[0, 1, 16, 17, 255]], recorded)


def test_tables_equal_the_stored_ones(goldens: Path) -> None:
    stored = load_file(goldens / "hf" / "ema.safetensors")
    for name in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"):
        cells, dim = stored[name].shape
        assert torch.equal(sincos_2d(dim, round(cells**0.5)), stored[name])


@pytest.mark.parametrize("side", [1, 5])
def test_first_half_is_the_column_second_half_the_row(side: int) -> None:
    table = sincos_2d(12, side).view(side, side, 2, 6)
    assert table.dtype == torch.float32
    assert torch.equal(table[:, :, 0], table[:1, :, 0].expand(side, side, 6))
    assert torch.equal(table[:, :, 1], table[:, :1, 1].expand(side, side, 6))
    assert torch.equal(table[:, :, 0], table[:, :, 1].transpose(0, 1))


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 4"):
        sincos_2d(10, 4)
