# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video a conversation shows, and the frames themselves: the index build turns a video into images.

It needs PyAV (the extra ``video``). The original draws other frames in every epoch. Here each row is drawn once, so that an index
holds pictures of known size and training decodes no video; with ``--store_videos`` the index holds the video, and epochs differ.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_bagel.data.keyed_random import keyed_integers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import av
    from PIL.Image import Image

JPEG_QUALITY = 95


@dataclass(frozen=True)
class FrameSampler:
    """The YAML's ``frame_sampler_args``, by the original's rules.

    ``sample`` "rand" draws a number of frames between ``min_num_frames`` and ``max_num_frames``, cuts the video into that many runs
    and draws a frame of each. "middle" takes the middle frame of each run. "fps2" takes two frames per second, up to
    ``max_num_frames``.
    """

    max_num_frames: int
    min_num_frames: int = 8
    sample: str = "rand"

    def __post_init__(self) -> None:
        if not 1 <= self.min_num_frames <= self.max_num_frames:
            raise ValueError(
                f"max_num_frames must be at least min_num_frames, and that 1 or more; got {self.max_num_frames} and {self.min_num_frames}"
            )
        if self.sample not in ("rand", "middle") and self.rate is None:
            raise ValueError(f'sample must be "rand", "middle" or "fps" and a number above 0 (frames per second), got {self.sample!r}')

    @property
    def rate(self) -> float | None:
        """Return the frames per second of "fps...", else None."""
        try:
            rate = float(self.sample.removeprefix("fps")) if self.sample.startswith("fps") else 0.0
        except ValueError:
            return None
        return rate if 0 < rate < float("inf") else None

    def choose(self, frames: int, fps: float, *key: int | str) -> list[int]:
        """Choose frame numbers, ascending, out of ``frames`` at ``fps`` per second; ``key`` names the draws."""
        if self.rate is not None:
            seconds = np.arange(0.5 / self.rate, frames / fps + 0.5 / self.rate, 1 / self.rate)
            frame_numbers = np.rint(seconds * fps).astype(int)
            return frame_numbers[frame_numbers < frames][: self.max_num_frames].tolist() or [frames // 2]
        num_frames = self.min_num_frames + keyed_integers(self.max_num_frames - self.min_num_frames + 1, 0, *key, "frames")
        edges = np.linspace(0, frames, min(num_frames, frames) + 1).astype(int)
        if self.sample == "middle":
            return ((edges[:-1] + edges[1:] - 1) // 2).tolist()
        draws = keyed_integers(np.diff(edges), 0, *key, "frame", np.arange(len(edges) - 1))
        return (edges[:-1] + draws).tolist()


class VideoInfo(NamedTuple):
    """What planning needs of a video: the number of its frames, frames per second, and pixels."""

    frames: int
    fps: float
    width: int
    height: int


def video_library() -> ModuleType:
    """Return PyAV. Raises ValueError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError("videos need PyAV, which is not installed (pip install 'megatron-bagel[video]')") from error
    return av


def video_info(data: bytes) -> VideoInfo:
    """Return what planning needs of a video file. It counts packets and decodes one frame.

    Raises ValueError if PyAV is not installed, or if it cannot decode the bytes.
    """
    with _readable() as av:
        frames, fps = _frames_and_rate(data)
        with av.open(io.BytesIO(data)) as container:
            first = next(container.decode(video=0), None)
    if first is None or not frames:
        raise ValueError("the video has no frame")
    return VideoInfo(frames, fps, first.width, first.height)


@contextmanager
def _readable() -> Iterator[ModuleType]:
    """Yield PyAV, and raise ValueError where it cannot decode a video in the block, or is not installed."""
    av = video_library()
    try:
        yield av
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"not a readable video ({error})") from error


def _frames_and_rate(data: bytes) -> tuple[int, float]:
    """Return the number of frames of a video file, counted by packets, and frames per second."""
    with video_library().open(io.BytesIO(data)) as container:
        rate = container.streams.video[0].average_rate
        return sum(packet.size > 0 for packet in container.demux(video=0)), float(rate or 1)


class VideoReader:
    """Reads frames of a video in ascending order in one pass; an earlier frame begins another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._next = data, 0
        self._frames: Iterator[av.VideoFrame] = iter(())

    def frame(self, number: int) -> Image:
        """Return frame ``number`` as RGB. Raises ValueError if it cannot be decoded, or PyAV is not installed."""
        av = video_library()
        try:
            if number < self._next or not self._next:
                self._frames, self._next = av.open(io.BytesIO(self._data)).decode(video=0), 0
            for frame in self._frames:
                self._next += 1
                if self._next == number + 1:
                    return frame.to_image()
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"frame {number} of the video cannot be decoded ({error})") from error
        raise ValueError(f"the video has {self._next} frames that can be decoded, no frame {number}")


def video_frames(data: bytes, sampler: FrameSampler, *key: int | str) -> list[bytes]:
    """Return the chosen frames of a video file, each as the bytes of a JPEG file.

    Raises ValueError if PyAV is not installed, or if it cannot decode the bytes.
    """
    with _readable() as av:
        total, fps = _frames_and_rate(data)
        with av.open(io.BytesIO(data)) as container:
            frame_numbers = set(sampler.choose(total, fps, *key)) if total else set()
            frames = [_jpeg(frame) for number, frame in enumerate(container.decode(video=0)) if number in frame_numbers]
    if not frames:
        raise ValueError("the video has no frame")
    return frames


def _jpeg(frame: av.VideoFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_image().save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
