# SPDX-License-Identifier: Apache-2.0
"""Videos in the index: other frames in every epoch, lengths known before reading, and the frames of the file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.cli.data.verify import main as verify
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.stored_videos import conversation_problem, video_numbers, with_frames
from megatron_bagel.data.sources.video import FrameSampler, VideoInfo
from megatron_bagel.layout.pack import PackImage, build_pack
from tests.data.clips import FRAMES, video
from tests.data.index_files import groups_of, noise_png, talk, write_lines
from tests.data.interleaved_rows import VIT
from tests.strategies import SPEC

SAMPLER = {"max_num_frames": 6, "min_num_frames": 2}


@given(st.integers(1, 300), st.sampled_from([5.0, 29.97]), st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_the_frames_of_an_epoch_take_the_place_of_the_video(frames: int, fps: float, most: int, row: int, epoch: int) -> None:
    structure = np.array([1, *video_numbers(VideoInfo(frames, fps, 64, 48)), 2], dtype=np.int32)
    sampler = FrameSampler(most, 1)
    shown = with_frames(structure, sampler, 3, "vlm_sft/chat", row, epoch)
    assert shown.structure.tolist() == [1, *[0] * len(shown.frames), 2] and shown.stored.tolist() == [0] * len(shown.frames)
    assert shown.frames.tolist() == sorted(set(shown.frames.tolist())) and 1 <= len(shown.frames) <= most and shown.frames[-1] < frames
    again = with_frames(structure, sampler, 3, "vlm_sft/chat", row, epoch)
    assert again.frames.tolist() == shown.frames.tolist()
    assert not conversation_problem(structure, 2, 1) and conversation_problem(structure, 2, 2) and conversation_problem(structure[:3], 1, 1)


@pytest.fixture(scope="module")
def source(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> GroupSource:
    """Two conversations about a video and one about a picture."""
    root = tmp_path_factory.mktemp("videos")
    (root / "vlm/images").mkdir(parents=True)
    (root / "vlm/images/clip.mp4").write_bytes(video())
    (root / "vlm/images/torn.mp4").write_bytes(video()[:200])
    (root / "vlm/images/a.png").write_bytes(noise_png(1))
    lines = [talk("look: <video> what is it?", video="clip.mp4"), talk("<image> and?", image="a.png"), talk("<video>", video="clip.mp4"),
             talk("no mark", video="clip.mp4"), talk("<video> <image>", video="clip.mp4"), talk("<video>", video="torn.mp4")]  # fmt: skip
    write_lines(root / "vlm/chat.jsonl", lines)
    options = BuildOptions(progress=False, row_rules=RowRules(store_videos=True))
    group = group_of(root)
    build_index([group], goldens / "hf", root / "index", options)
    index = IndexedSamples.open(root / "index")
    assert sum(index.manifest.datasets[0].skipped.values()) == 3
    assert verify([str(root / "index")]) == 0
    return GroupSource(group, [index.datasets["vlm_sft/chat"]], PlanSettings(seed=3, layout=SPEC))


def group_of(root: Path, **keys: object) -> GroupConfig:
    return groups_of(root, "vlm_sft", image_transform_args=VIT, frame_sampler_args=SAMPLER, **keys)[0]


def test_lengths_are_known_and_epochs_differ(source: GroupSource) -> None:
    seen = set()
    for epoch in range(6):
        rows = np.arange(len(source))[::-1].copy()
        measured = source.measure(rows, epoch)
        samples = [source.sample(int(row), epoch) for row in rows]
        packs = [build_pack([sample], SPEC) for sample in samples]
        assert measured.tokens.tolist() == [pack.sequence_length for pack in packs]
        frames = [image.frame for image in packs[-1].images]
        assert 2 <= len(frames) <= 6 and {image.image for image in packs[-1].images} == {0}
        assert [image.frame for image in packs[1].images] == [None]  # the picture
        seen.add(tuple(frames))
    assert len(seen) > 3


def test_pixels_are_those_of_the_frames(source: GroupSource) -> None:
    pack = build_pack([source.sample(0, 0)], SPEC)
    for image in [*pack.images, *reversed(pack.images)]:  # forwards, and backwards
        assert image.frame is not None
        pixels = source.picture(0, image)
        assert pixels.shape == (3, image.height, image.width)
        assert 255 * (pixels.mean().item() / 2 + 0.5) / 12 == pytest.approx(image.frame, abs=1.0)
    with pytest.raises(ValueError, match=f"the video has {FRAMES} frames that can be decoded, no frame 99"):
        source.picture(0, PackImage("vit", 0, 0, 28, 28, False, 0, 4, frame=99))


def test_an_index_with_videos_needs_a_sampler(source: GroupSource, tmp_path: Path) -> None:
    (group,) = groups_of(tmp_path, "vlm_sft", image_transform_args=VIT)
    without = GroupSource(group, source.readers(), PlanSettings(seed=3, layout=SPEC))
    with pytest.raises(ValueError, match="the index holds videos .*; give the group frame_sampler_args"):
        without.measure(np.arange(3), 0)


def test_an_index_with_videos_needs_the_decoder(source: GroupSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when the first video is planned, before any sample counts as broken."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"videos need PyAV, which is not installed \(pip install 'megatron-bagel\[video\]'\)"):
        source.measure(np.arange(3), 0)
