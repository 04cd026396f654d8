# SPDX-License-Identifier: Apache-2.0
"""Latents that are encoded one step early change no number: the runs are those without the flag, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from megatron_bagel.config.parser import Config
from tests.distributed import run_ranks
from tests.runs import numbers, open_run, run, run_config
from tests.training.equal_runs import CP, PP, SETTINGS, SP_TP2, VPP, Result, cases, stored_tensors, world_of

pytestmark = pytest.mark.distributed

STEPS = 4
#: A global batch that grows, held-out losses in between, and workers that read ahead by themselves.
FLAGS: dict[str, Any] = {
    **SETTINGS, "total_steps": STEPS, "save_every": 2, "rampup_batch_size": [2, 2, 4], "split": "75,25", "eval_every": 2, "eval_samples": 4,
    "num_workers": 1, "on_bad_step": "rerun",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2)


def result(world: Path, folder: Path, ranks: int, **flags: Any) -> Result:
    settings = {**FLAGS, **flags}
    history = run(run_config(world, folder, ranks, **settings), ranks)
    return numbers(history), stored_tensors(folder / f"checkpoints/{settings['total_steps']:07d}")


def assert_same_bits(ours: Result, theirs: Result) -> None:
    assert ours[0] == theirs[0] and len(ours[0]) == STEPS
    assert ours[1].keys() == theirs[1].keys()
    assert [name for name in ours[1] if not torch.equal(ours[1][name], theirs[1][name])] == []


LAYOUTS = {
    "one-process": (1, {}),
    "dp2-no-workers": (2, {"num_workers": 0}),
    "pp2": (2, {PP: 2}),
    "tp2-sp-pp2": (4, {**SP_TP2, PP: 2}),
    "cp2-pp2-vpp2": (4, {CP: 2, PP: 2, VPP: 2}),
    "first-stage-pp2": (2, {PP: 2, "encoder_placement": "first_stage"}),
}


@pytest.mark.parametrize(("ranks", "layout"), cases(LAYOUTS, "one-process", "pp2"))
def test_the_same_bits_as_without(world: Path, tmp_path: Path, ranks: int, layout: dict[str, Any]) -> None:
    """Also from the checkpoint of step 2, which was saved while the batch of the step after it was read and encoded already.

    The last checkpoint is removed, as after a kill before it.
    """
    expected = result(world, tmp_path / "plain", ranks, **layout)
    early = {**layout, "overlap_vae_encode": True}
    assert_same_bits(result(world, tmp_path / "early", ranks, **early), expected)
    shutil.rmtree(latest_checkpoint(tmp_path / "early/checkpoints"))
    assert latest_checkpoint(tmp_path / "early/checkpoints").name == "0000002"
    assert_same_bits(result(world, tmp_path / "early", ranks, **early), expected)


def _calls(config: Config) -> list[tuple[int, int]]:
    """Pictures that the autoencoder has encoded after the encoding of each step's own batch, and after the step."""
    from megatron_bagel.training import loop
    from megatron_bagel.training import step as steps

    run = open_run(config)
    count, calls, encoder = 0, [], run.trainable.image_encoder
    original, forward_backward = encoder.autoencoder.encode_many, steps._forward_backward

    def counted(images: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal count
        count += len(images)
        return original(images)

    def recorded(*arguments: Any) -> list[torch.Tensor]:
        calls.append(count)
        return forward_backward(*arguments)

    encoder.autoencoder.encode_many, steps._forward_backward = counted, recorded
    pictures = []
    for _ in range(config.training.total_steps):
        batch = loop.next_batch(run)
        pictures.append(sum(len(pack.pack.images_of("vae")) for pack in batch.packs))
        result = loop.step(run, batch, None)
        run.counters = run.counters.after(result, 0, 0)
    run.loader.close()
    assert count == sum(pictures), "each picture is encoded once"
    return list(zip(pictures, calls, strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_the_next_pictures_are_encoded_before_the_schedule(world: Path, tmp_path: Path, early: bool) -> None:
    """Each picture once, and none beyond the last step."""
    config = run_config(world, tmp_path, total_steps=3, overlap_vae_encode=early)
    ((first, second, third),) = run_ranks(_calls, 1, config)
    pictures = [first[0], second[0], third[0]]
    assert min(pictures) > 0
    encoded = [sum(pictures[: number + 1 + early]) for number in range(3)]
    assert [first[1], second[1], third[1]] == encoded
