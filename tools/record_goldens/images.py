# SPDX-License-Identifier: Apache-2.0
"""Records the original's transforms of images: output sizes over a table of inputs, pixels, patches, and positions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from tools.record_goldens.files import GoldenFolder
from tools.record_goldens.original import Original

_TRANSFORMS = (
    {"max_image_size": 1024, "min_image_size": 512, "image_stride": 16},
    {"max_image_size": 518, "min_image_size": 224, "image_stride": 14},
    {"max_image_size": 980, "min_image_size": 378, "image_stride": 14, "max_pixels": 2_007_040},
    {"max_image_size": 980, "min_image_size": 224, "image_stride": 14},
    {"max_image_size": 64, "min_image_size": 32, "image_stride": 16},
)
_SIZES = (
    (1024, 1024), (512, 512), (640, 480), (480, 640), (1920, 1080), (300, 200), (2000, 100), (100, 3000), (17, 17), (999, 1001),
    (5000, 4000), (768, 520), (1500, 1498), (64, 64), (7, 900),
)  # fmt: skip
_SHARED_BY = (1, 2, 4)
_ROWS = (0, 2)
_VIT_PATCH = 14


def record_images(original: Original, folder: GoldenFolder) -> None:
    """Write ``data/resize_table.json`` and ``data/image_tensors.safetensors``."""
    folder.json("data/resize_table.json", {"default_max_pixels": 14 * 14 * 9 * 1024, "rows": _resize_table(original)})
    folder.tensors("data/image_tensors.safetensors", _image_tensors(original, folder.root / "raw_data"))


def _resize_table(original: Original) -> list[dict[str, Any]]:
    """Return the size that each transform asks its resizing for. Nothing is resized."""
    functions = original.transforms.F
    resize = functions.resize
    asked: list[list[int]] = []

    def kept_size(image: Any, size: list[int], *args: Any, **kwargs: Any) -> Any:
        asked.append(size)
        return image

    functions.resize = kept_size
    rows = []
    try:
        for settings in _TRANSFORMS:
            transform = original.transforms.ImageTransform(**settings)
            for width, height in _SIZES:
                image = Image.new("RGB", (width, height)) if width * height < 1e6 else torch.empty(3, height, width, device="meta")
                for images in _SHARED_BY:
                    transform.resize_transform(image, img_num=images)
                    rows.append({
                        "cfg": settings, "width": width, "height": height, "img_num": images, "out_height": asked[-1][0],
                        "out_width": asked[-1][1],
                    })  # fmt: skip
    finally:
        functions.resize = resize
    return rows


def _image_tensors(original: Original, raw: Path) -> dict[str, Tensor]:
    """Return pixels of two rows, patches of one, and positions of grids."""
    utils, transform = original.data_utils, original.transforms.ImageTransform
    table = pq.read_table(raw / "t2i/0000.parquet").to_pylist()
    tensors: dict[str, Tensor] = {}
    for row in _ROWS:
        image = utils.pil_img2rgb(Image.open(io.BytesIO(table[row]["image"])))
        tensors[f"t2i_0000_row{row}_vae"] = transform(64, 32, 16)(image)
        tensors[f"t2i_0000_row{row}_vit"] = transform(56, 28, _VIT_PATCH)(image)
    vit = tensors["t2i_0000_row0_vit"]
    tensors["row0_vit_patchified"] = utils.patchify(vit, _VIT_PATCH)
    extrapolate, interpolate = utils.get_flattened_position_ids_extrapolate, utils.get_flattened_position_ids_interpolate
    for name, positions in (("extrapolate", extrapolate), ("interpolate", interpolate)):
        tensors[f"row0_vit_pos_{name}"] = positions(*vit.shape[1:], _VIT_PATCH, max_num_patches_per_side=16)
    for height, width in ((980, 658), (378, 518), (14, 980)):
        positions = interpolate(height, width, _VIT_PATCH, max_num_patches_per_side=70)
        tensors[f"pos_interp_{height}x{width}_p14_m70"] = positions.to(torch.int32)
    return tensors
