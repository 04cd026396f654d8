# SPDX-License-Identifier: Apache-2.0
"""Training on conversations about videos: with ``--store_videos`` each epoch shows other frames, on any workers and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_bagel.cli.data import build
from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import architecture
from megatron_bagel.data.loading.build import open_loader
from megatron_bagel.data.tokenizer import load_tokenizer
from tests.data.clips import video
from tests.data.index_files import talk, write_lines
from tests.data.interleaved_rows import VIT
from tests.runs import make_world, numbers, run, run_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS = 6
#: Patches of two frames, which every sample has.
SEEN = 24


def build_indexes(world: Path) -> None:
    """One conversation about one clip, as ``videos.yaml``, with the video in one index and frames of it in the other."""
    (world / "clips").mkdir()
    (world / "clips/clip.mp4").write_bytes(video())
    write_lines(world / "clips/chat.jsonl", [talk("<video> what is it?", video="clip.mp4")])
    group = {"dataset_names": ["chat"], "jsonl_path": ["clips/chat.jsonl"], "data_dir": ["clips"], "weight": 1,
             "vit_image_transform_args": VIT, "image_transform_args": VIT,
             "frame_sampler_args": {"max_num_frames": 6, "min_num_frames": 2}}  # fmt: skip
    (world / "videos.yaml").write_text(yaml.safe_dump({"vlm_sft": group}))
    flags = ["--dataset_config_file", str(world / "videos.yaml"), "--tokenizer", str(world / "data/tokenizer")]
    assert build.main([*flags, "--output", str(world / "stored"), "--store_videos"]) == 0
    assert build.main([*flags, "--output", str(world / "frames")]) == 0


def patches(config: Config) -> set[bytes]:
    """What the vision tower sees of the first sample of each step, without doubles."""
    tokenizer = load_tokenizer(Path(config.model.llm_path))
    loader = open_loader(data_settings(config), architecture(config), tokenizer, 1)
    return {next(loader).packs[0].vit_patches[:SEEN].numpy().tobytes() for _ in range(STEPS)}


def test_epochs_show_other_frames_on_any_workers_and_after_a_resume(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    build_indexes(world)
    flags = {"dataset_config_file": str(world / "videos.yaml"), "global_batch_size": 1, "visual_gen": False, "save_every": 3}
    flags |= {"expected_num_tokens": 60, "max_num_tokens": 160, "max_num_tokens_per_sample": 160}
    stored = {**flags, "index_dir": str(world / "stored")}
    whole = run(run_config(world, tmp_path / "whole", total_steps=STEPS, **stored))
    run(run_config(world, tmp_path / "parts", total_steps=3, num_workers=2, **stored))
    assert numbers(run(run_config(world, tmp_path / "parts", total_steps=STEPS, num_workers=1, **stored))) == numbers(whole)
    frames = {**flags, "index_dir": str(world / "frames")}
    assert len(run(run_config(world, tmp_path / "frames", total_steps=STEPS, **frames))) == STEPS
    # One row: every sample is another epoch of it.
    assert len(patches(run_config(world, tmp_path / "read", **frames))) == 1
    assert len(patches(run_config(world, tmp_path / "read", **stored))) > STEPS // 2
