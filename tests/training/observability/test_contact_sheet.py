# SPDX-License-Identifier: Apache-2.0
"""A sheet shows every picture whole, whatever sizes and prompts come together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bagel.training.observability.contact_sheet import SheetRow, as_pixels, contact_sheet


def block(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def test_every_picture_is_on_the_sheet_enlarged() -> None:
    long = "a very long prompt of many words " * 10
    rows = [SheetRow("short", (("made", block(32, 64, (255, 0, 0))),)), SheetRow(long, (("given", block(200, 10, (0, 0, 255))),))]
    pixels = np.asarray(contact_sheet(rows))
    assert (pixels == (255, 0, 0)).all(-1).sum() == (4 * 32) * (4 * 64)
    assert (pixels == (0, 0, 255)).all(-1).sum() == 200 * 10


def test_prompts_in_any_script_do_not_stop_it() -> None:
    assert contact_sheet([SheetRow("画一个红色的圆", (("made", block(16, 16, (1, 2, 3))),))]).width > 0


def test_nothing_to_show_is_said() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([SheetRow("a", ())])


def test_transformed_images_come_back() -> None:
    pixels = torch.arange(48).reshape(3, 4, 4) * 5
    assert (as_pixels(pixels / 127.5 - 1) == pixels.permute(1, 2, 0).numpy()).all()
