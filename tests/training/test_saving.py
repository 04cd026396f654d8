# SPDX-License-Identifier: Apache-2.0
"""Saves of whole runs: in the background as well as waited for, thinned out, exported while training goes on, and damage found."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_bagel.checkpoint.dist.step_folders import checkpoints
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.training.observability.metrics_file import read_history
from megatron_bagel.training.saving import HFExporter
from tests.checkpoint.tiny_run import train_and_save
from tests.distributed import run_ranks
from tests.runs import make_world, numbers, run, run_config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointWeights(folder)
    return {key: checkpoint.read(key) for key in checkpoint.keys()}  # noqa: SIM118


def _flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_background_saves_are_the_waited_for_ones_and_old_ones_go(world: Path, tmp_path: Path) -> None:
    flags = {"total_steps": 4, "save_every": 1}
    waited = run_config(world, tmp_path / "waited", 2, **flags)
    kept = run_config(world, tmp_path / "kept", 2, **flags, async_save=True, keep_last=1, keep_every=3, export_hf_every=2)
    assert numbers(run(waited, ranks=2)) == numbers(run(kept, ranks=2))
    assert [folder.name for folder in checkpoints(waited.training.checkpoint_dir)] == ["0000001", "0000002", "0000003", "0000004"]
    left = checkpoints(kept.training.checkpoint_dir)
    assert [folder.name for folder in left] == ["0000003", "0000004"]
    for folder in left:
        expected, got = _tensors(tmp_path / "waited/checkpoints" / folder.name), _tensors(folder)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    exported = sorted(folder.name for folder in (tmp_path / "kept/hf").iterdir())
    assert exported == ["0000002", "0000004"]
    checkpoint = CheckpointWeights(left[-1])
    written = load_file(tmp_path / "kept/hf/0000004/ema.safetensors")
    assert written.keys() == WeightMap(checkpoint.arch).hf_shapes().keys()
    name = "decoder.layers.1.mlp.gen.linear_fc2.weight"
    hf = WeightMap(checkpoint.arch).entries[name].hf[0]
    assert torch.equal(written[hf], checkpoint.ema(name).bfloat16())


@pytest.mark.slow
def test_a_run_whose_epochs_are_used_up_saves_its_last_step(world: Path, tmp_path: Path) -> None:
    groups = yaml.safe_load((world / "data/dataset.yaml").read_text())
    for name in groups.keys() - {"dataset_info"}:
        groups[name] |= {"max_epochs": 1, "is_mandatory": False}
    (world / "data/once.yaml").write_text(yaml.safe_dump(groups))
    flags = {"dataset_config_file": str(world / "data/once.yaml"), "total_steps": 1000, "save_every": 1000, "num_workers": 1}
    config = run_config(world, tmp_path, 2, **flags)
    with pytest.raises(AssertionError, match="no sample is left to draw at step"):
        run(config, ranks=2)
    done = len(read_history(tmp_path / "metrics.jsonl"))
    assert done > 2 and [int(folder.name) for folder in checkpoints(config.training.checkpoint_dir)] == [done]


def test_an_export_runs_beside_the_training_and_a_failed_one_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [whole] = run_ranks(train_and_save, 1, tmp_path, {}, 1, 0, parallel={})
    checkpoint, torn = tmp_path / "0000001", tmp_path / "0000003"
    shutil.copytree(checkpoint, torn)
    next(torn.glob("*.distcp")).unlink()
    exporter = HFExporter(tmp_path, every=1)
    for folder in (checkpoint, torn):
        exporter.add(folder)
    assert exporter.in_use() == [torn, checkpoint], "whoever adds a checkpoint must not wait for its export"
    with caplog.at_level(logging.INFO):
        exporter.finish()
    assert exporter.in_use() == []
    head = load_file(tmp_path / "hf/0000001/ema.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(head, whole["ema.decoder.output_layer.weight"].bfloat16())
    assert f"exported {checkpoint} to" in caplog.text and f"{torn} could not be exported" in caplog.text
    assert "is missing" in (tmp_path / "hf/0000003.log").read_text() and not (tmp_path / "hf/0000003").exists()


def test_a_damaged_checkpoint_is_passed_over_and_a_named_one_refused(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path, total_steps=4, save_every=2)
    expected = numbers(run(config))
    newest = tmp_path / "checkpoints/0000004"
    shard = next(newest.glob("*.distcp"))
    _flip(shard, shard.stat().st_size // 2)
    again = numbers(run(run_config(world, tmp_path, total_steps=4, save_every=2)))
    assert again == expected
    log = (tmp_path / "log.txt").read_text()
    assert f"{shard.name} does not have the checksum it was written with): the step before it is used" in log
    assert "continuing from" in log and "0000002" in log
    _flip(shard := next(newest.glob("*.distcp")), shard.stat().st_size // 2)
    named = {"auto_resume": False, "resume_from": str(newest)}
    with pytest.raises(AssertionError, match=f"{shard.name} does not have the checksum"):
        run(run_config(world, tmp_path / "other", total_steps=5, **named))
    for folder in (tmp_path / "checkpoints").iterdir():
        if folder.is_dir():
            shard = next(folder.glob("*.distcp"))
            shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="no checkpoint in .* can be used"):
        run(config)
