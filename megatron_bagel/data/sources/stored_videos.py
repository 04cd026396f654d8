# SPDX-License-Identifier: Apache-2.0
"""Videos in the index (``--store_videos``): one image of the sample is the file, and its frames are chosen in every epoch.

In the structure of a conversation a video is three numbers: VIDEO_ITEM, its frames, and its frames per 1000 seconds. ``with_frames`` makes
of them what planning knows: one image for each frame that an epoch shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM
from megatron_bagel.data.sources.video import FrameSampler, VideoInfo

VIDEO_ITEM = 3
_NUMBERS = 3


def video_numbers(info: VideoInfo) -> list[int]:
    """Return the numbers of a video in a structure."""
    return [VIDEO_ITEM, info.frames, round(1000 * info.fps)]


def has_video(structure: np.ndarray) -> bool:
    """Return whether the structure of a conversation holds a video."""
    return bool((structure == VIDEO_ITEM).any())  # without one there is no number above ANSWER_ITEM


@dataclass(frozen=True)
class ShownImages:
    """The images of a sample in an epoch.

    ``structure`` has IMAGE_ITEM for each of them, ``stored`` the number of each in the index, and ``frames`` the number of its frame, -1
    for a picture.
    """

    structure: np.ndarray
    stored: np.ndarray
    frames: np.ndarray


def conversation_items(structure: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield (code, frames, frames per second) of each item; the last two are 0 but for videos. Raises ValueError if numbers are missing."""
    position = 0
    while position < len(structure):
        code = int(structure[position])
        if code != VIDEO_ITEM:
            yield code, 0, 0.0
            position += 1
            continue
        if position + _NUMBERS > len(structure):
            raise ValueError("the numbers of a video are missing")
        yield code, int(structure[position + 1]), int(structure[position + 2]) / 1000
        position += _NUMBERS


def with_frames(structure: np.ndarray, sampler: FrameSampler, *key: int | str) -> ShownImages:
    """Choose the frames of the videos of a conversation; ``key`` names the draws: seed, dataset, row, epoch."""
    codes: list[int] = []
    stored: list[int] = []
    frames: list[int] = []
    image = 0
    for code, count, fps in conversation_items(structure):
        chosen = sampler.choose(count, fps, *key, "video", image) if code == VIDEO_ITEM else [-1]
        if code in (IMAGE_ITEM, VIDEO_ITEM):
            codes += [IMAGE_ITEM] * len(chosen)
            stored += [image] * len(chosen)
            frames += chosen
            image += 1
        else:
            codes.append(code)
    return ShownImages(np.array(codes, dtype=np.int32), np.array(stored, dtype=np.int64), np.array(frames, dtype=np.int64))


def conversation_problem(structure: np.ndarray, texts: int, images: int) -> bool:
    """Return whether the structure of a conversation does not describe its texts and images."""
    try:
        found = list(conversation_items(structure))
    except ValueError:
        return True
    codes = [code for code, _, _ in found]
    shown = sum(code in (IMAGE_ITEM, VIDEO_ITEM) for code in codes)
    are_known = all(0 <= code <= ANSWER_ITEM or (code == VIDEO_ITEM and frames > 0 and fps > 0) for code, frames, fps in found)
    return not (are_known and shown == images and len(codes) - shown == texts)
