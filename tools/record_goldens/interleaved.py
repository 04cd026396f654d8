# SPDX-License-Identifier: Apache-2.0
"""A pack of two interleaved samples, put through the original's packing of single samples, and the transforms of images.

The first sample has a text with loss after a clean image, losses on special tokens, and an image after a noised one. The second has a
noised clip of three frames and a clean one of two. No data set of the original makes such samples; its trainer takes them.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from tools.record_goldens.data import LIMITS, Batch, DataSource

_FRAMES, _CLEAN_FRAMES = 3, 2


def _item(kind: str, loss: int, label: int | None = None, **more: Any) -> dict[str, Any]:
    """Return an entry of a plan; ``label`` adds a loss on its closing token."""
    return {
        "type": kind, "enable_cfg": 0, "loss": loss, "special_token_loss": int(label is not None), "special_token_label": label, **more,
    }  # fmt: skip


def _clip(loss: int, frames: int, delta: int) -> list[dict[str, Any]]:
    """Return the frames of a clip, which share a split and lie ``delta`` positions apart."""
    return [
        _item("vae_image", loss, split_start=k == 0, split_end=k == frames - 1, **({"frame_delta": delta} if k < frames - 1 else {}))
        for k in range(frames)
    ]


def interleaved_batch(data: DataSource) -> Batch:
    """Return the pack."""
    transform, small = data.original.transforms.ImageTransform, data.original.data_utils.pil_img2rgb
    for_vae, for_vit = transform(48, 32, 16), transform(56, 28, 14)
    bos, image_start = data.special["bos_token_id"], data.special["start_of_image"]

    def picture(number: int) -> Image.Image:
        return small(Image.open(data.raw / f"vlm/images/{number}.png"))

    frames = [for_vae(picture(2).resize((32, 32)).rotate(30 * k)) for k in range(_FRAMES)]
    texts_and_images = {
        "sequence_plan": [
            _item("text", 0), _item("vae_image", 0), _item("vit_image", 0, bos), _item("text", 1, image_start), _item("vae_image", 1, bos),
            _item("text", 1),
        ],
        "text_ids_list": [[64, 70, 75], [259, 316, 405, 11], [71, 72]],
        "image_tensor_list": [for_vae(picture(0)), for_vit(picture(0)), for_vae(picture(3))],
    }  # fmt: skip
    clips = {
        "sequence_plan": [
            _item("text", 0), *_clip(1, _FRAMES, 2), _item("text", 1), *_clip(0, _CLEAN_FRAMES, 3), _item("text", 1),
        ],
        "text_ids_list": [[80, 81], [90, 91, 92], [93]],
        "image_tensor_list": [*frames, *(frame.clone() for frame in frames[:_CLEAN_FRAMES])],
    }  # fmt: skip
    packed = data.dataset(limits={**LIMITS, "max_num_tokens": 160})
    status = packed.set_sequence_status()
    for sample in (texts_and_images, clips):
        status = packed.pack_sequence({**sample, "num_tokens": 0, "data_indexes": {}}, status)
    batch: Batch = packed.to_tensor(status)
    batch["batch_data_indexes"] = []
    return batch
