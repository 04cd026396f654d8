# SPDX-License-Identifier: Apache-2.0
"""A folder of the released size goes into a checkpoint and back bit for bit, in little memory; a rank reads its share of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.released_size import ZeroLayers, main, needed_bytes

#: As few zeros as the disk permits.
CHOICES = (ZeroLayers(), ZeroLayers(1, 3), ZeroLayers(2, 3))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_released_size_comes_back_bit_for_bit(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    zero_layers = next((choice for choice in CHOICES if needed_bytes(choice) <= free), None)
    if zero_layers is None:
        pytest.skip(f"{free / 1e9:.0f} GB are free, {needed_bytes(CHOICES[-1]) / 1e9:.0f} are needed: name a larger disk with --basetemp")
    result = main(["--folder", str(tmp_path), *(["--zero-layers", str(zero_layers)] if zero_layers.count else [])])
    assert result["equal_after_both"] and result["weight_bytes"] > 29e9
    for way in ("hf_to_megatron", "megatron_to_hf"):
        assert result[way]["peak_bytes"] < 3e9
    assert all(rank["read_over_share"] <= 1.05 for rank in result["ranks"])
    assert list(tmp_path.iterdir()) == []
