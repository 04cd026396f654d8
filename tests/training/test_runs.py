# SPDX-License-Identifier: Apache-2.0
"""Whole runs on real data: the same numbers after any kill, on any number of ranks and workers, and for every kind of data."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from megatron_bagel.data.loading.build import open_loader
from tests.runs import make_world, numbers, resolved, run, run_config, start
from tests.training.equal_runs import OVERLAP, cases

pytestmark = pytest.mark.distributed


#: What a line of metrics.jsonl holds at least.
LOGGED = (
    "step", "loss", "ce", "mse", "grad_norm", "lr", "consumed_samples", "consumed_tokens", "ce_tokens", "mse_tokens", "step_time_s",
    "tokens_per_s", "tflops", "mfu", "peak_mem_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Six uninterrupted steps on one rank."""
    return numbers(run(run_config(world, tmp_path_factory.mktemp("straight"), total_steps=6)))


def close(left: list[tuple], right: list[tuple]) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_leaves_its_numbers_and_a_curve(world: Path, tmp_path: Path) -> None:
    history = run(run_config(world, tmp_path, total_steps=3))
    assert [record["step"] for record in history] == [0, 1, 2]
    assert all(record[name] > 0 for record in history for name in LOGGED if name not in ("step", "mfu"))
    assert all(record["mfu"] >= 0 for record in history)  # 0 where the device's peak rate is not known, as a CPU's
    assert history[0]["lr"] == pytest.approx(5e-4) and history[2]["lr"] == pytest.approx(1e-3)
    assert history[-1]["loss"] < history[0]["loss"]
    for name in ("loss.png", "log.txt", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 0
    assert "Train Loss mse: " in (tmp_path / "log.txt").read_text()
    assert latest_checkpoint(tmp_path / "checkpoints").name == "0000003"


def test_resume_is_the_same_run(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    """Continuation, and more workers: equal to the last bit."""
    run(run_config(world, tmp_path, total_steps=4))
    assert numbers(run(run_config(world, tmp_path, total_steps=6, num_workers=2))) == straight


@pytest.mark.parametrize(
    ("flags",), cases({"plain": {}, "overlap": OVERLAP, "whole-optimizer": {"use_distributed_optimizer": False}}, "overlap")
)
def test_two_ranks_give_the_same_numbers(world: Path, tmp_path: Path, straight: list[tuple], flags: dict) -> None:
    close(numbers(run(run_config(world, tmp_path, total_steps=6, **flags), ranks=2)), straight)


@pytest.mark.slow
def test_another_number_of_ranks_continues_the_run(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    run(run_config(world, tmp_path, total_steps=3), ranks=2)
    close(numbers(run(run_config(world, tmp_path, total_steps=6))), straight)


@pytest.mark.slow
def test_a_batch_that_grows_is_the_same_on_other_ranks_and_after_a_resume(world: Path, tmp_path: Path) -> None:
    flags = {"global_batch_size": 4, "rampup_batch_size": [2, 2, 6], "total_steps": 6}
    expected = numbers(run(run_config(world, tmp_path / "one", **flags)))
    run(run_config(world, tmp_path / "two", 2, **{**flags, "total_steps": 2}), ranks=2)
    close(numbers(run(run_config(world, tmp_path / "two", num_workers=1, **flags))), expected)


@pytest.mark.slow
def test_recompute_changes_nothing(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    flags = {"recompute_granularity": "full", "recompute_vit": True}
    close(numbers(run(run_config(world, tmp_path, total_steps=6, **flags))), straight)


KILLED = {"one-rank": (1, {}), "two-ranks": (2, {}), "encoding-ahead": (2, {"overlap_vae_encode": True})}


@pytest.mark.parametrize(("ranks", "flags"), cases(KILLED, "two-ranks"))
def test_killed_runs_continue_bit_for_bit(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    """SIGKILL at a random moment, and the same command again."""
    expected = numbers(run(run_config(world, tmp_path / "whole", total_steps=8), ranks))
    config = run_config(world, tmp_path / "killed", total_steps=8, **flags)
    process = start(config, ranks)
    first = Path(config.training.checkpoint_dir) / "0000002"
    deadline = time.monotonic() + 120
    while not first.is_dir() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.random())
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert latest_checkpoint(config.training.checkpoint_dir) is not None
    assert numbers(run(config, ranks)) == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_and_double_nothing(world: Path, tmp_path: Path) -> None:
    """SIGKILL from the first moments of a start to the middle of steps and saves; every step is in the record once, and the same."""
    expected = numbers(run(run_config(world, tmp_path / "whole", total_steps=40)))
    config, moments = run_config(world, tmp_path / "killed", total_steps=40), random.Random(0)
    for _ in range(20):
        before = latest_checkpoint(config.training.checkpoint_dir)
        process = start(config, 1)
        process.join(moments.uniform(0.1, 6.0))
        with contextlib.suppress(ProcessLookupError):  # not yet the leader of its group, or done
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        after = latest_checkpoint(config.training.checkpoint_dir)
        assert before is None or after.name >= before.name
    assert numbers(run(config)) == expected


KINDS: dict[str, tuple[dict, str | None]] = {
    "no-vit": ({"visual_und": False}, None),
    "no-images-out": ({"visual_gen": False}, "mse"),
    "freeze-vit-moe": ({"freeze_vit": True, "layer_module": "Qwen2MoEDecoderLayer"}, None),
    "freeze-und": ({"freeze_und": True}, None),
    "freeze-llm-dense": ({"freeze_llm": True, "layer_module": "Qwen2DecoderLayer"}, None),
    "tied-cosine": ({"tie_word_embeddings": True, "ce_loss_reweighting": True, "lr_scheduler": "cosine", "total_steps": 3}, None),
    "bf16": ({"bf16": True, "lr": 1e-4}, None),
    "as-the-original": ({"vae_encode_padded": True, "vae_encode_bf16": True, "zero_lr_first_step": True, "interpolate_pos": True}, None),
}


@pytest.mark.parametrize(("flags", "absent"), cases(KINDS, "no-images-out", "freeze-llm-dense", "tied-cosine", "bf16", "as-the-original"))
def test_every_kind_of_training_runs(world: Path, tmp_path: Path, flags: dict, absent: str | None) -> None:
    history = run(run_config(world, tmp_path, **{"total_steps": 3, **flags}))
    for record in history:
        assert record["loss"] > 0 and record["grad_norm"] > 0
        assert absent is None or record[absent] == 0
    if flags.get("zero_lr_first_step"):
        assert history[0]["lr"] == 0


def test_text_alone_trains_on_two_ranks(world: Path, tmp_path: Path) -> None:
    groups = yaml.safe_load((world / "data/dataset.yaml").read_text())
    only = {name: content for name, content in groups.items() if name in ("text", "dataset_info")}
    only["text"]["weight"] = 1
    path = tmp_path / "text.yaml"
    path.write_text(yaml.safe_dump(only))
    config = run_config(world, tmp_path, dataset_config_file=str(path), visual_gen=False, visual_und=False, total_steps=2)
    history = run(config, ranks=2)
    assert history[-1]["ce"] > 0 and history[-1]["mse"] == 0


def test_ranks_whose_packs_lack_a_modality(world: Path, tmp_path: Path) -> None:
    """Packs of one task: a step in which one rank has pictures to draw alone and the other questions alone is that of one rank."""
    content = yaml.safe_load((world / "data/dataset.yaml").read_text())
    groups = {name: {**content[name], "is_mandatory": False, "weight": weight} for name, weight in (("t2i_pretrain", 1), ("vlm_sft", 5))}
    (tmp_path / "any.yaml").write_text(yaml.safe_dump({**groups, "dataset_info": content["dataset_info"]}))
    short = {"dataset_config_file": str(tmp_path / "any.yaml"), "data_seed": 2, "total_steps": 3}
    short |= {"expected_num_tokens": 1, "max_num_tokens": 64, "max_num_tokens_per_sample": 64}
    config = run_config(world, tmp_path / "alone", **short)
    made = resolved(config)
    loader = open_loader(made.data, made.arch, made.tokenizer, 2)
    first = [{image.kind for image in loaded.pack.images} for loaded in next(loader).packs]
    assert first == [{"vae"}, {"vit"}]
    close(numbers(run(run_config(world, tmp_path / "two", **short), ranks=2)), numbers(run(config)))


def test_frozen_parts_do_not_move(world: Path, tmp_path: Path) -> None:
    from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights

    run(run_config(world, tmp_path, total_steps=2, save_every=1, freeze_und=True))
    first, last = (CheckpointWeights(tmp_path / "checkpoints" / name) for name in ("0000001", "0000002"))
    for name in first.keys():  # noqa: SIM118
        if ".und." in name or name.startswith(("embedding.", "vit_model.", "connector.")):
            assert torch.equal(first.read(name), last.read(name)), f"{name} moved"
    for name in ("output_layer.weight", "decoder.layers.0.mlp.gen.linear_fc2.weight"):
        assert not torch.equal(first.read(name), last.read(name))
