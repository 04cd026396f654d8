# SPDX-License-Identifier: Apache-2.0
"""Frames of a video take the place of its mark; which ones is the original's rule, drawn once per row."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources import parse
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, TEXT_ITEM
from megatron_bagel.data.sources.video import FrameSampler, video_frames
from tests.data.clips import video
from tests.data.index_files import groups_of, reasons, talk, write_lines

QUIET = BuildOptions(progress=False)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 500), st.sampled_from(["rand", "middle"]), st.integers(0, 99))
def test_runs_of_a_video_give_a_frame_each(low: int, more: int, frames: int, sample: str, row: int) -> None:
    sampler = FrameSampler(low + more, low, sample)
    chosen = sampler.choose(frames, 25.0, 0, row)
    assert chosen == sampler.choose(frames, 25.0, 0, row)
    assert min(low, frames) <= len(chosen) <= min(low + more, frames)
    edges = np.linspace(0, frames, len(chosen) + 1).astype(int)
    assert all(start <= frame < end for start, frame, end in zip(edges[:-1], chosen, edges[1:], strict=True))
    assert chosen == sorted(set(chosen))


@given(st.integers(1, 500), st.sampled_from([5.0, 24.0, 29.97]), st.integers(1, 20))
def test_frames_at_a_rate(frames: int, fps: float, most: int) -> None:
    chosen = FrameSampler(most, 1, "fps2").choose(frames, fps, 0, 0)
    assert 1 <= len(chosen) <= most and chosen == sorted(chosen) and chosen[-1] < frames
    assert all(abs((b - a) - fps / 2) <= 1 for a, b in zip(chosen, chosen[1:], strict=False))


def test_other_rows_draw_other_frames() -> None:
    sampler = FrameSampler(12, 8)
    assert len({tuple(sampler.choose(300, 25.0, 0, row)) for row in range(20)}) == 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_frames": 4}, "at least min_num_frames"),  # the default min_num_frames is 8
        ({"min_num_frames": 8}, "max_num_frames is missing"),
        ({"max_num_frames": 4, "min_num_frames": 0}, "1 or more"),
        ({"max_num_frames": "4"}, "whole number"),
        ({"max_num_frames": 9, "sample": "fpsx"}, "frames per second"),
        ({"max_num_frames": 9, "sample": "fps-1"}, "frames per second"),
        ({"max_num_frames": 9, "samples": "rand"}, "did you mean 'sample'"),
    ],
)
def test_bad_sampler_settings_are_refused(args: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        groups_of(tmp_path, "vlm_sft", frame_sampler_args=args)


def test_only_conversations_have_videos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only the group vlm_sft has videos"):
        groups_of(tmp_path, "t2i_pretrain", frame_sampler_args={"max_num_frames": 9})


def conversations(root: Path) -> None:
    (root / "vlm/images").mkdir(parents=True)
    (root / "vlm/images/clip.mp4").write_bytes(b"no video")
    lines = [talk("look: <video> what is it?", video="clip.mp4"), talk("no mark", video="clip.mp4"), talk("<video>", video=["clip.mp4"]),
             talk("<video>", video="gone.mp4"), talk("plain")]  # fmt: skip
    write_lines(root / "vlm/chat.jsonl", lines)


def test_frames_stand_at_the_mark(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the decoder, which gives three grey frames."""

    def three_frames(data: bytes, sampler: FrameSampler, *key: int) -> list[bytes]:
        assert data == b"no video" and sampler.max_num_frames == 9
        pictures = []
        for grey in (10, 20, 30):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 32), (grey,) * 3).save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        return pictures

    conversations(tmp_path)
    monkeypatch.setattr(parse, "video_frames", three_frames)
    build_index(groups_of(tmp_path, "vlm_sft", frame_sampler_args={"max_num_frames": 9}), goldens / "hf", tmp_path / "index", QUIET)
    reader = IndexedSamples.open(tmp_path / "index").datasets["vlm_sft/chat"]
    assert reader.record(0).structure.tolist() == [TEXT_ITEM, IMAGE_ITEM, IMAGE_ITEM, IMAGE_ITEM, TEXT_ITEM, ANSWER_ITEM]
    assert [Image.open(io.BytesIO(reader.image_bytes(0, i))).getpixel((0, 0))[0] for i in range(3)] == [10, 20, 30]
    told = reasons(tmp_path / "index")
    assert sorted(told) == [1, 2, 3]
    for row, words in {1: "no <video> mark", 2: "not a file name", 3: "gone.mp4 cannot be read"}.items():
        assert words in told[row]


def test_videos_are_kept_out_where_they_cannot_be_read(goldens: Path, tmp_path: Path) -> None:
    conversations(tmp_path)
    build_index(groups_of(tmp_path, "vlm_sft"), goldens / "hf", tmp_path / "index", QUIET)
    assert all("no frame_sampler_args" in reason for reason in reasons(tmp_path / "index").values())
    groups = groups_of(tmp_path, "vlm_sft", frame_sampler_args={"max_num_frames": 9})
    build_index(groups, goldens / "hf", tmp_path / "with", QUIET)
    assert "not a readable video" in (told := reasons(tmp_path / "with")[0]) or "PyAV, which is not installed" in told


def test_frames_of_a_real_video() -> None:
    """The chosen frames of a clip whose frames grow brighter."""
    frames = [Image.open(io.BytesIO(data)) for data in video_frames(video(), FrameSampler(5, 5, "middle"), 0, 0)]
    assert [frame.size for frame in frames] == [(64, 48)] * 5
    shown = [np.asarray(frame).mean() / 12 for frame in frames]
    assert shown == pytest.approx([1, 5, 9, 13, 17], abs=1.0)
    with pytest.raises(ValueError, match="not a readable video"):
        video_frames(b"no video", FrameSampler(5, 5), 0, 0)
