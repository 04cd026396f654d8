"""Sizes and pixels after the image transform equal the goldens; sizes keep their bounds for any input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from megatron_bagel.data.transforms import (
    TransformArgs,
    complete_size,
    decode_rgb,
    decoded_size,
    image_tensor,
    open_image,
    output_size,
    output_sizes,
    vit_patches,
)


def test_sizes_equal_the_goldens(goldens: Path) -> None:
    table = json.loads((goldens / "data/resize_table.json").read_text())
    for row in table["rows"]:
        args = TransformArgs(**row["cfg"])
        assert output_size(args, row["width"], row["height"], row["img_num"]) == (row["out_width"], row["out_height"]), row
    assert len(table["rows"]) == 225
    assert table["default_max_pixels"] == TransformArgs(2, 1, 1).max_pixels


def test_pixels_equal_the_goldens(goldens: Path) -> None:
    expected = load_file(goldens / "data/image_tensors.safetensors")
    rows = pq.read_table(goldens / "raw_data/t2i/0000.parquet").column("image")
    for row in (0, 2):  # row 2 is RGBA
        image = decode_rgb(rows[row].as_py())
        for kind in ("vae", "vit"):
            want = expected[f"t2i_0000_row{row}_{kind}"]
            got = image_tensor(image, TransformArgs(64, 16, 16), want.shape[2], want.shape[1])
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(vit_patches(expected["t2i_0000_row0_vit"], 14), expected["row0_vit_patchified"], rtol=0, atol=0)


@given(
    width=st.integers(1, 5000), height=st.integers(1, 5000), img_num=st.integers(1, 8), stride=st.sampled_from([8, 14, 16]),
    long=st.integers(16, 1500), ratio=st.floats(0.1, 1.0),
)  # fmt: skip
def test_no_side_passes_the_bound(width: int, height: int, img_num: int, stride: int, long: int, ratio: float) -> None:
    args = TransformArgs(long, max(1, int(long * ratio)), stride)
    out = output_size(args, width, height, img_num)
    assert max(out) <= args.longest_side
    assert all(side % stride == 0 and side >= stride for side in out)
    many = output_sizes(args, np.full(3, width), np.full(3, height), np.full(3, img_num))
    assert many[0].tolist() == [out[0]] * 3 and many[1].tolist() == [out[1]] * 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(np.full((4, 6), 1000, np.uint16)) if mode == "I;16" else Image.new(mode, (6, 4))
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode_rgb(buffer.getvalue()).mode == "RGB"


def test_transparent_pixels_are_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"no image at all"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="image"):
        open_image(data)


def test_a_cut_image_is_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="decoded"):
        decode_rgb(buffer.getvalue()[:2000])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_image_size"):
        TransformArgs(32, 64, 16)
    with pytest.raises(ValueError, match="image_stride"):
        vit_patches(torch.zeros(3, 15, 14), 14)


@pytest.mark.parametrize(("mode", "progressive"), [("RGB", False), ("RGB", True), ("L", False), ("CMYK", False)])
def test_the_short_check_of_a_jpeg_finds_what_decoding_finds(mode: str, progressive: bool) -> None:
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((150, 100)).convert(mode).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()
    assert decoded_size(data) == (150, 100) == decode_rgb(data).size

    def found(check: Callable[[bytes], object], part: bytes) -> bool:
        try:
            check(part)
        except ValueError:
            return True
        return False

    cuts = [*range(0, len(data), 61), len(data) - 1]
    for check in (decoded_size, complete_size):
        assert [found(check, data[:cut]) for cut in cuts] == [found(decode_rgb, data[:cut]) for cut in cuts]
    assert found(decoded_size, data[: len(data) // 2])
    assert complete_size(data) == complete_size(data + bytes(20)) == (150, 100)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_the_check_of_the_structure_finds_images_that_are_cut_off(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(buffer, kind)
    data = buffer.getvalue()
    assert complete_size(data) == (32, 40)
    for cut in (0, 10, len(data) // 3, len(data) // 2):
        with pytest.raises(ValueError, match="image"):
            complete_size(data[:cut])


def test_the_check_of_the_structure_finds_a_flipped_bit_in_a_png() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    for place in range(16, len(buffer.getvalue()) - 12, 97):
        data = bytearray(buffer.getvalue())
        data[place] ^= 8
        with pytest.raises(ValueError, match="image|above the limit"):
            complete_size(bytes(data))
