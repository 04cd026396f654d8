"""Image sizes without pixels: an image's transformed size is a pure function of its stored size, so planning never decodes.

Planning a pack uses ``output_size``, and loading it uses ``image_tensor``; both apply the same ``TransformArgs``. The rules, including
the roundings, are the original's (goldens hold 225 sizes and the pixels of RGB and RGBA images).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024
PIXEL_LIMIT = 200_000_000  # an image above this counts as a decompression bomb, unless a build sets another limit
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
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"not a readable image ({error})") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are above the limit of {max_pixels}")
    return image


def decode_rgb(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT) -> Image.Image:
    """Decode an image to RGB. Transparency (RGBA, LA, palette) becomes white, and 16-bit grey values become 8-bit ones.

    Raises ValueError if the bytes cannot be decoded, for example because the file is truncated, or as ``open_image`` does.
    """
    image = open_image(data, max_pixels)
    try:
        if image.mode in ("RGBA", "LA", "PA") or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.split()[3])
            return white
        if image.mode in ("F", "I") or image.mode.startswith("I;16"):
            return _from_wide_grey(image).convert("RGB")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise ValueError(f"the image cannot be decoded ({error})") from error


def decoded_size(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT) -> tuple[int, int]:
    """Return the (width, height) in pixels of an image after decoding all of its bytes. Raises ValueError as ``decode_rgb`` does.

    A JPEG is decoded to an eighth of its size, which reads all of its data but saves most of the arithmetic.
    """
    image = open_image(data, max_pixels)
    if image.format != "JPEG":
        return decode_rgb(data, max_pixels).size
    size = image.size
    try:
        image.draft(None, (1, 1))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the image cannot be decoded ({error})") from error
    return size


def complete_size(data: bytes | memoryview, max_pixels: int = PIXEL_LIMIT) -> tuple[int, int]:
    """Return the (width, height) in pixels of a complete image. Raises ValueError if it is truncated, or if a PNG has a wrong byte.

    A PNG's checksums are compared and a JPEG must end with its end mark, without decompression. Other formats use ``decoded_size``.
    """
    image = open_image(data, max_pixels)
    if image.format == "PNG":
        try:
            image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"the image cannot be decoded ({error})") from error
        return image.size
    if image.format == "JPEG" and bytes(data[-64:]).rstrip(b"\0").endswith(b"\xff\xd9"):
        return image.size
    return decoded_size(data, max_pixels)


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit values to 8-bit grey. Pillow (and the original) would clip them at 255, which makes nearly all white."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; convert the image to 8 bits per channel")
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def image_tensor(image: Image.Image, args: TransformArgs, width: int, height: int) -> torch.Tensor:
    """Resize an RGB image to ``width`` x ``height`` (bicubic with antialias) and normalise it: float32 [3, height, width]."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255.0)
    mean = torch.tensor(args.image_mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(args.image_std, dtype=torch.float32).view(3, 1, 1)
    return pixels.sub_(mean).div_(std)


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
