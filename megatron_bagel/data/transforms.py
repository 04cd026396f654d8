# SPDX-License-Identifier: Apache-2.0
"""Image sizes without pixels: an image's transformed size is a pure function of its stored size, so planning never decodes.

Planning a pack uses ``output_size``, and loading it uses ``image_tensor``; both apply the same ``TransformArgs``. The rules, including
the roundings, are the original's (goldens hold 225 sizes and the pixels of RGB and RGBA images).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_bagel.platform.device import to_device

DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024
PIXEL_LIMIT = 200_000_000  # an image above this counts as a decompression bomb, unless a build sets another limit
EXIF_MODES = ("turn", "ignore")  # pictures as their EXIF orientation says, or as they are stored
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_EXIF_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where Pillow finds the orientation of a PNG
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is lower than the original's, so ``open_image`` checks instead


@dataclass(frozen=True)
class TransformArgs:
    """How one kind of image is resized: bounds of its sides in pixels, the grid its sides are rounded to, mean and deviation.

    ``max_image_size`` bounds the long side, ``min_image_size`` lifts the short side, and sides become multiples of
    ``image_stride``. The images of one sample share ``max_pixels``.
    """

    max_image_size: int
    min_image_size: int
    image_stride: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("max_image_size", "min_image_size", "image_stride", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.min_image_size > self.max_image_size:
            raise ValueError(f"min_image_size {self.min_image_size} is larger than max_image_size {self.max_image_size}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(f"image_mean and image_std need 3 values, deviations above 0; got {self.image_mean}, {self.image_std}")

    @property
    def longest_side(self) -> int:
        """Return the largest side in pixels of any transformed image."""
        rounded = round(self.max_image_size / self.image_stride) * self.image_stride
        return max(self.image_stride, rounded)


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    width, height = round(width * scale), round(height * scale)
    return max(stride, round(width / stride) * stride), max(stride, round(height / stride) * stride)


def output_size(args: TransformArgs, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image of ``width`` x ``height`` after the transform.

    ``img_num`` is the number of images of the sample, which share ``max_pixels``. Shrinking to ``max_pixels`` uses the ratio of
    areas, not its square root, as the original does. An image slightly too large becomes much smaller than necessary.
    """
    scale = min(args.max_image_size / max(width, height), 1.0)
    scale = max(scale, args.min_image_size / min(width, height))
    new_width, new_height = _scaled(width, height, scale, args.image_stride)
    budget = args.max_pixels / img_num
    if new_width * new_height > budget:
        new_width, new_height = _scaled(new_width, new_height, budget / (new_width * new_height), args.image_stride)
    if max(new_width, new_height) > args.max_image_size:
        new_width, new_height = _scaled(new_width, new_height, args.max_image_size / max(new_width, new_height), args.image_stride)
    return new_width, new_height


def output_sizes(
    args: TransformArgs, widths: np.ndarray, heights: np.ndarray, img_nums: np.ndarray | int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Apply ``output_size`` to arrays of images, equal to it element by element (int64)."""

    def scaled(width: np.ndarray, height: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sides = (np.rint(np.rint(side * scale) / args.image_stride) * args.image_stride for side in (width, height))
        width, height = (np.maximum(args.image_stride, side).astype(np.int64) for side in sides)
        return width, height

    def rescale_if(needs_rescale: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rescaled = scaled(width, height, scale)
        return np.where(needs_rescale, rescaled[0], width), np.where(needs_rescale, rescaled[1], height)

    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    scale = np.minimum(args.max_image_size / np.maximum(widths, heights), 1.0)
    width, height = scaled(widths, heights, np.maximum(scale, args.min_image_size / np.minimum(widths, heights)))
    budget = args.max_pixels / np.asarray(img_nums)
    width, height = rescale_if(width * height > budget, budget / (width * height))
    longest_side = np.maximum(width, height)
    return rescale_if(longest_side > args.max_image_size, args.max_image_size / longest_side)


def open_image(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT) -> Image.Image:
    """Open an encoded image without decoding its pixels.

    Raises ValueError if the bytes are no image, or one of more than ``max_pixels`` pixels.
    """
    if not len(data):
        raise ValueError("the image has no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its text contains a memory address, which would differ between builds
        raise ValueError("not a readable image (of no known format)") from error
    except MemoryError:
        raise
    except Exception as error:  # every format is a plugin, which may raise anything
        raise ValueError(f"not a readable image ({_described(error)})") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {max_pixels}")
    if min(image.size) < 1:
        raise ValueError(f"the image has no pixels ({image.width} x {image.height})")
    return image


def decode_rgb(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT, exif: str = EXIF_MODES[0]) -> Image.Image:
    """Decode an image to RGB. Transparency (RGBA, LA, palette) becomes white, and 16-bit grey values become 8-bit ones.

    ``exif`` "turn" turns the picture as its EXIF orientation says, as viewers do; "ignore" leaves it as it is stored. Of an animation
    the first frame counts.

    Raises ValueError if the bytes cannot be decoded, for example because the file is truncated, or as ``open_image`` does.
    """
    image = open_image(data, max_pixels)
    with _decoding():
        picture = _as_rgb(image)
        turn = _TURNS.get(_orientation(image)) if exif == "turn" else None
        return picture if turn is None else picture.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _from_wide_grey(image, transparency).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or transparency is not None:
        tiles = getattr(image, "tile", None)
        if isinstance(transparency, tuple) and tiles and tiles[0][3] == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in transparency)  # Pillow makes only the pixels 8-bit
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        return white
    if image.mode == "RGB":
        image.load()
        return image  # ``convert`` would copy it
    return image.convert("RGB")


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder raises into ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # every format is a plugin, which may raise anything
        raise ValueError(f"the image cannot be decoded ({_described(error)})") from error


def _described(error: Exception) -> str:
    is_sentence = isinstance(error, OSError | SyntaxError | ValueError | EOFError | IndexError)
    return str(error) if is_sentence else f"{type(error).__name__}: {error}"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (as stored) to 8; 1 if there is none or its EXIF cannot be read.

    Pillow turns TIFF itself, whoever decodes it, so TIFF has 1 here.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError, struct.error):
        return 1  # damaged EXIF turns nothing, as in viewers
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _shown_size(image: Image.Image, data: bytes | memoryview, exif: str) -> tuple[int, int]:
    """Return (width, height) of the decoded picture of an opened image."""
    # Pillow decodes a PNG to look for EXIF behind its pixels, so it is asked only where there can be some.
    has_exif = exif == "turn" and (image.format != "PNG" or any(mark in bytes(data) for mark in _PNG_EXIF_MARKS))
    width, height = image.size
    return (height, width) if has_exif and _orientation(image) >= 5 else (width, height)


def header_size(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT, exif: str = EXIF_MODES[0]) -> tuple[int, int]:
    """Return the (width, height) in pixels of the decoded picture from the header of its file. Raises ValueError as ``open_image`` does."""
    return _shown_size(open_image(data, max_pixels), data, exif)


def decoded_size(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT, exif: str = EXIF_MODES[0]) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image after decoding all of its bytes. Raises ValueError as ``decode_rgb`` does.

    A JPEG is decoded to an eighth of its size, which reads all of its data but saves most of the arithmetic.
    """
    image = open_image(data, max_pixels)
    if image.format != "JPEG":
        return decode_rgb(data, max_pixels, exif).size
    size = _shown_size(image, data, exif)
    with _decoding():
        image.draft(None, (1, 1))
        image.load()
    return size


def complete_size(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT, exif: str = EXIF_MODES[0]) -> tuple[int, int]:
    """Return the (width, height) in pixels of a complete image. Raises ValueError if it is truncated, or if a PNG has a wrong byte.

    A PNG's checksums are compared and a JPEG must end with its end mark, without decompression. Other formats use ``decoded_size``.
    """
    image = open_image(data, max_pixels)
    if image.format == "PNG":
        with _decoding():
            image.verify()
        return header_size(data, max_pixels, exif)  # a verified image cannot be used again
    if image.format == "JPEG" and bytes(data[-64:]).rstrip(b"\0").endswith(b"\xff\xd9"):
        return _shown_size(image, data, exif)
    return decoded_size(data, max_pixels, exif)


def _from_wide_grey(image: Image.Image, transparency: int | None) -> Image.Image:
    """Convert 16-bit values to 8-bit grey, and the value that counts as transparent to white.

    Pillow (and the original) would clip values at 255, which makes nearly all white.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert the image to 8 bits per channel")
    values = np.asarray(image).astype(np.uint32)
    grey = (values >> 8).astype(np.uint8)
    if transparency is not None:
        grey[values == transparency] = 255
    return Image.fromarray(grey)


@dataclass(frozen=True)
class Normalization:
    """How the 8-bit values of an image become the numbers of a model: mean and deviation of each channel, of values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, values: torch.Tensor, channel: int) -> torch.Tensor:
        """Return uint8 ``values``, whose dimension ``channel`` has the three channels, as float32 on the same device.

        Each operation rounds as the original's does, so the bits are the same on every device.
        """
        if self.is_uniform:
            return self.of_any_channel(values)
        shape = [3 if dimension == channel % values.dim() else 1 for dimension in range(values.dim())]
        mean, std = (_row(numbers, values.device).view(shape) for numbers in (self.mean, self.std))
        return values.to(torch.float32).div_(255.0).sub_(mean).div_(std)

    @property
    def is_uniform(self) -> bool:
        """Return whether mean and deviation are the same in all channels."""
        return len(set(self.mean)) == len(set(self.std)) == 1

    def of_any_channel(self, values: torch.Tensor) -> torch.Tensor:
        """Do the same for ``values`` of any channels in any order, if the normalisation is uniform: several times as fast."""
        if values.device.type == "cpu":
            # Not with torch: its other threads would wait for their next work busily, on the cores of the processes that read.
            numbers = values.numpy().astype(np.float32)
            numbers /= np.float32(255)
            numbers -= np.float32(self.mean[0])
            numbers /= np.float32(self.std[0])
            return torch.from_numpy(numbers)
        mean, std = (_row(numbers[:1], values.device) for numbers in (self.mean, self.std))
        return values.to(torch.float32).div_(255.0).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _row(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return ``numbers`` on ``device``. They are kept, because a copy to a GPU would make the host wait."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class RawImage:
    """A resized image before its normalisation, as it travels between processes: a quarter of the bytes.

    ``values`` is uint8 [height, width, 3].
    """

    values: torch.Tensor
    normalization: Normalization

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of the normalised image, [3, height, width]."""
        height, width, channels = self.values.shape
        return channels, height, width

    def normalized(self) -> torch.Tensor:
        """Return the image as the model's encoders take it, float32 [3, height, width]."""
        return self.normalization(self.values.permute(2, 0, 1).contiguous(), 0)


@dataclass(frozen=True)
class RawPatches:
    """The patches of a ViT image before their normalisation: uint8 [tokens, patch * patch * 3], as ``vit_patches`` orders them."""

    values: torch.Tensor
    normalization: Normalization

    def __len__(self) -> int:
        return len(self.values)


def ready_images(images: Sequence[torch.Tensor | RawImage], device: torch.device | str) -> list[torch.Tensor]:
    """Return images as an encoder takes them, float32 [3, height, width] each on ``device``; 8-bit values are normalised there.

    Neighbours of one uniform normalisation travel and are normalised together, since a picture alone is too little work for a call.
    """
    ready: list[torch.Tensor] = []
    for normalization, run in groupby(images, key=_normalization_of):
        if normalization is None:
            ready += [to_device(image, device) for image in run if isinstance(image, torch.Tensor)]
            continue
        raw = [image for image in run if isinstance(image, RawImage)]
        if normalization.is_uniform:
            ready += _normalized_together(raw, normalization, device)
        else:
            ready += [RawImage(to_device(image.values, device), normalization).normalized() for image in raw]
    return ready


def _normalization_of(image: torch.Tensor | RawImage | RawPatches) -> Normalization | None:
    return None if isinstance(image, torch.Tensor) else image.normalization


def _normalized_together(images: Sequence[RawImage], normalization: Normalization, device: torch.device | str) -> list[torch.Tensor]:
    values = to_device(torch.cat([image.values.reshape(-1) for image in images]), device)
    sizes = [image.values.numel() for image in images]
    channels_first = torch.empty_like(values)
    for image, source, target in zip(images, values.split(sizes), channels_first.split(sizes), strict=True):
        target.view(image.shape).copy_(source.view(image.values.shape).permute(2, 0, 1))
    ready = normalization.of_any_channel(channels_first)
    return [part.view(image.shape) for image, part in zip(images, ready.split(sizes), strict=True)]


def ready_patches(images: Sequence[torch.Tensor | RawPatches], width: int, device: torch.device | str) -> torch.Tensor:
    """Return the patches of all images one after the other, float32 [tokens, width] on ``device``."""
    parts = [torch.zeros(0, width, device=device)]
    for normalization, run in groupby(images, key=_normalization_of):
        values = to_device(torch.cat([image if isinstance(image, torch.Tensor) else image.values for image in run]), device)
        parts.append(values if normalization is None else normalization(values.view(len(values), -1, 3), 2).view(values.shape))
    return torch.cat(parts) if len(parts) > 2 else parts[-1]


def resized(image: Image.Image, args: TransformArgs, width: int, height: int) -> RawImage:
    """Resize an RGB image to ``width`` x ``height`` (bicubic with antialias)."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return RawImage(torch.from_numpy(np.array(image)), Normalization(tuple(args.image_mean), tuple(args.image_std)))


def image_tensor(image: Image.Image, args: TransformArgs, width: int, height: int) -> torch.Tensor:
    """Resize an RGB image to ``width`` x ``height`` (bicubic with antialias) and normalise it: float32 [3, height, width]."""
    return resized(image, args, width, height).normalized()


def vit_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut pixels [3, H, W] into row-major patches [H/patch * W/patch, patch*patch*3], each in (row, column, channel) order.

    Raises ValueError if a side is not a multiple of ``patch``.
    """
    channels, height, width = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"an image of {height} x {width} pixels has no whole number of {patch}-pixel patches; set image_stride to {patch}")
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(channels, rows, patch, columns, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(rows * columns, patch * patch * channels)
