# SPDX-License-Identifier: Apache-2.0
"""Sizes and pixels after the image transform equal the goldens; sizes keep their bounds for any input."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from safetensors.torch import load_file

from megatron_bagel.data.transforms import (
    Normalization,
    RawImage,
    RawPatches,
    TransformArgs,
    complete_size,
    decode_rgb,
    decoded_size,
    header_size,
    image_tensor,
    open_image,
    output_size,
    output_sizes,
    ready_images,
    ready_patches,
    resized,
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
            raw = resized(image, TransformArgs(64, 16, 16), want.shape[2], want.shape[1])
            assert raw.values.dtype == torch.uint8 and raw.shape == want.shape and torch.equal(ready_images([raw], "cpu")[0], want)
            if kind == "vit":
                patches = RawPatches(vit_patches(raw.values.permute(2, 0, 1), 2), raw.normalization)
                both = ready_patches([patches, vit_patches(want, 2), patches, patches], 12, "cpu")  # raw ones, ready ones, two raw ones
                assert torch.equal(both, vit_patches(want, 2).repeat(4, 1))
    torch.testing.assert_close(vit_patches(expected["t2i_0000_row0_vit"], 14), expected["row0_vit_patchified"], rtol=0, atol=0)


@pytest.mark.parametrize("mean, std", [((0.5,) * 3, (0.5,) * 3), ((0.45,) * 3, (0.3,) * 3), ((0.48, 0.45, 0.4), (0.26, 0.26, 0.27))])
def test_pictures_normalised_together_have_the_bits_of_each_alone(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """The reference is the original's: torchvision's, on each picture."""
    one, other = Normalization(mean, std), Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    values = torch.arange(256, dtype=torch.uint8).repeat(3).view(16, 16, 3)
    raw = [RawImage(values, one), RawImage(values[:3].clone(), one), RawImage(values, other), RawImage(values[:, :5].contiguous(), one)]
    images = [raw[0], torch.zeros(3, 2, 2), *raw[1:]]
    ready = ready_images(images, "cpu")
    assert torch.equal(ready.pop(1), images[1])  # a posterior of a cache passes
    for image, got in zip(raw, ready, strict=True):
        scale = [torch.tensor(numbers).view(3, 1, 1) for numbers in (image.normalization.mean, image.normalization.std)]
        want = (image.values.permute(2, 0, 1).float() / 255 - scale[0]) / scale[1]
        assert torch.equal(got, want) and got.is_contiguous() and torch.equal(image.normalized(), want)


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


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def two_colours(mode: str = "RGB", size: tuple[int, int] = (16, 8)) -> Image.Image:
    """Orange at the left, blue at the right."""
    image = Image.new("RGB", size, ORANGE)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def grey16(*values: int) -> Image.Image:
    """Grey of 16 bits: a value for the left half and one for the right."""
    return Image.fromarray(np.repeat(np.array(values, dtype=np.uint16), 8)[None].repeat(8, 0))


def rgb16_png(transparent: tuple[int, int, int] | None = None) -> bytes:
    """A PNG of 16 bits per channel, which Pillow reads and cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    left, right = ([value << 8 | 0x37 for value in colour] for colour in (ORANGE, BLUE))
    row = b"\0" + struct.pack(">3H", *left) * 8 + struct.pack(">3H", *right) * 8
    alpha = b"" if transparent is None else chunk(b"tRNS", struct.pack(">3H", *(value << 8 | 0x37 for value in transparent)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 8, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + alpha + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")


def half_clear(mode: str) -> Image.Image:
    """Orange at the left, transparent at the right."""
    image = two_colours("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.array([255, 0], dtype=np.uint8), 8)[None].repeat(8, 0)))
    return image.convert(mode)


ORANGE, BLUE, WHITE, BLACK = (230, 120, 20), (0, 0, 200), (255, 255, 255), (0, 0, 0)
GREY_ORANGE, GREY_BLUE = (141, 141, 141), (23, 23, 23)
# docs/data.md, "Pictures": what is stored, and the colours of its left and right half (None: kept out).
PICTURES: dict[str, tuple[Callable[[], bytes], tuple | None, tuple | None]] = {
    "RGB": (lambda: saved(two_colours()), ORANGE, BLUE),
    "JPEG": (lambda: saved(two_colours(), "JPEG", quality=95), ORANGE, BLUE),
    "CMYK JPEG": (lambda: saved(two_colours("CMYK"), "JPEG", quality=95), ORANGE, BLUE),
    "CMYK TIFF": (lambda: saved(two_colours("CMYK"), "TIFF"), ORANGE, BLUE),
    "YCbCr TIFF": (lambda: saved(two_colours("YCbCr"), "TIFF"), ORANGE, BLUE),
    "grey": (lambda: saved(two_colours("L")), GREY_ORANGE, GREY_BLUE),
    "black and white": (lambda: saved(two_colours("L").point(lambda value: 255 * (value > 99)).convert("1")), WHITE, BLACK),
    "palette": (lambda: saved(two_colours().quantize(4)), ORANGE, BLUE),
    "GIF": (lambda: saved(two_colours(), "GIF"), ORANGE, BLUE),
    "BMP": (lambda: saved(two_colours(), "BMP"), ORANGE, BLUE),
    "RGBA": (lambda: saved(half_clear("RGBA")), ORANGE, WHITE),
    "RGBA TIFF": (lambda: saved(half_clear("RGBA"), "TIFF"), ORANGE, WHITE),
    "RGBA WebP": (lambda: saved(half_clear("RGBA"), "WEBP", lossless=True), ORANGE, WHITE),
    "grey with alpha": (lambda: saved(half_clear("LA")), GREY_ORANGE, WHITE),
    "palette with transparency": (lambda: saved(half_clear("RGBA").quantize(4)), ORANGE, WHITE),
    "a transparent colour": (lambda: saved(two_colours(), transparency=BLUE), ORANGE, WHITE),
    "a transparent grey": (lambda: saved(two_colours("L"), transparency=GREY_BLUE[0]), GREY_ORANGE, WHITE),
    "16-bit grey PNG": (lambda: saved(grey16(120 << 8 | 99, 60 << 8)), (120,) * 3, (60,) * 3),
    "16-bit grey TIFF": (lambda: saved(grey16(120 << 8, 60 << 8), "TIFF"), (120,) * 3, (60,) * 3),
    "16-bit grey PGM": (lambda: saved(grey16(120 << 8, 60 << 8), "PPM"), (120,) * 3, (60,) * 3),
    "16-bit grey, a value transparent": (lambda: saved(grey16(120 << 8, 60 << 8), transparency=60 << 8), (120,) * 3, WHITE),
    "16-bit RGB": (rgb16_png, ORANGE, BLUE),
    "16-bit RGB, a colour transparent": (lambda: rgb16_png(BLUE), ORANGE, WHITE),
    "32-bit grey TIFF": (lambda: saved(two_colours("I"), "TIFF"), None, None),
    "floating-point TIFF": (lambda: saved(two_colours("F"), "TIFF"), None, None),
    "animated GIF": (lambda: saved(two_colours(), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 8))]), ORANGE, BLUE),
    "pages of a TIFF": (lambda: saved(two_colours(), "TIFF", save_all=True, append_images=[Image.new("RGB", (16, 8))]), ORANGE, BLUE),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_becomes_what_the_table_says(name: str) -> None:
    make, left, right = PICTURES[name]
    if left is None or right is None:
        with pytest.raises(ValueError, match="no known range"):
            decode_rgb(make())
        return
    picture = decode_rgb(make())
    assert picture.mode == "RGB" and picture.size == (16, 8) == complete_size(make()) == decoded_size(make()) == header_size(make())
    for place, colour in (((2, 4), left), ((13, 4), right)):
        assert np.abs(np.subtract(picture.getpixel(place), colour)).max() <= 4, (place, picture.getpixel(place))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = two_colours(size=(16, 8))
    stored.paste(BLACK, (0, 0, 8, 4))  # so that no two of the eight are equal
    data = saved(stored, kind, exif=exif, quality=95)
    as_stored = decode_rgb(data, exif="ignore")
    assert as_stored.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes() and as_stored.size == (16, 8)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode_rgb(data).tobytes() == expected.tobytes() and decode_rgb(data).size == expected.size
    for size in (complete_size, decoded_size, header_size):
        assert size(data) == expected.size and size(data, exif="ignore") == (16, 8)


def test_a_tiff_is_turned_by_pillow_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(two_colours(), "TIFF", exif=exif)
    assert decode_rgb(data).size == decode_rgb(data, exif="ignore").size == header_size(data) == complete_size(data) == (8, 16)


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(two_colours(), exif=exif)
    start = data.index(b"eXIf") - 4
    length = struct.unpack(">I", data[start : start + 4])[0] + 12
    chunk, end = data[start : start + length], data[-12:]
    moved = data[:start] + data[start + length : -12] + chunk + end
    assert decode_rgb(moved).size == header_size(moved) == complete_size(moved) == decoded_size(moved) == (8, 16)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0", b"Exif\0\0junk and more junk", b"Exif\0\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_turns_nothing(exif: bytes, kind: str) -> None:
    data = saved(two_colours(), kind, exif=exif)
    assert decode_rgb(data).tobytes() == decode_rgb(data, exif="ignore").tobytes()
    assert complete_size(data) == header_size(data) == (16, 8)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_turn_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode_rgb(saved(two_colours(), "JPEG", exif=exif)).size == (16, 8)


@pytest.mark.parametrize("error", [KeyError("a tag"), struct.error("short"), ZeroDivisionError(), AttributeError("none"), RecursionError()])
def test_whatever_a_plugin_raises_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A format of which the plugin fails as no plugin of Pillow does today, once while opening and once while decoding."""
    raising = {"open": True}

    class Plugin(ImageFile.ImageFile):
        format = "ROWS"

        def _open(self) -> None:
            if raising["open"]:
                raise error
            self._mode, self._size, self.tile = "RGB", (4, 4), []

        def load(self) -> None:
            raise error

    monkeypatch.setitem(Image.OPEN, "ROWS", (Plugin, lambda prefix: prefix.startswith(b"ROWS")))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "ROWS"])
    with pytest.raises(ValueError, match="not a readable image"):
        decode_rgb(b"ROWS" * 9)
    raising["open"] = False
    with pytest.raises(ValueError, match=f"cannot be decoded .*{type(error).__name__}"):
        decode_rgb(b"ROWS" * 9)
