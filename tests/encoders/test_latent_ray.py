# SPDX-License-Identifier: Apache-2.0
"""Actors of a real Ray encode latents: some are killed at random moments, and the cache is that of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_bagel.cli.data.latents import main
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import save_autoencoder
from tests.data.index_files import SIZES, files_of, noise_png, write_t2i
from tests.ray_kills import run_and_kill
from tests.runs import AUTOENCODER

SHARDS, ROWS, KILLS = 8, 20, 2


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_actors_change_no_byte(goldens: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for number in range(SHARDS):
        rows = [(noise_png(number * ROWS + row, 48, 48), json.dumps({"a": "picture"})) for row in range(ROWS)]
        write_t2i(tmp_path / "t2i", rows, f"{number:04d}.parquet")
    keys = {"dataset_names": ["t2i"], "weight": 1, "data_dir": ["t2i"], "image_transform_args": SIZES}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"t2i_pretrain": keys}))
    index = tmp_path / "index"
    build_index(load_groups(tmp_path / "data.yaml"), goldens / "hf", index, BuildOptions(rows_per_shard=ROWS, progress=False))
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AUTOENCODER), tmp_path / "ae.safetensors")
    inputs = [str(index), "--dataset_config_file", str(tmp_path / "data.yaml"), "--vae", str(tmp_path / "ae.safetensors")]
    assert main([*inputs, "--output", str(tmp_path / "alone")]) == 0
    command = ["-m", "megatron_bagel", "data", "latents", *inputs, "--output", str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"]
    assert run_and_kill(command, "ray::_Encoder.write", KILLS) == KILLS
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "alone")
