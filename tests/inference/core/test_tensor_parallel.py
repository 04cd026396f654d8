# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a decoder say and draw what one process does; copies of the model answer side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.cli.generate import collect_prompts
from megatron_bagel.inference.batch.arguments import parse_arguments
from megatron_bagel.inference.batch.requests import Request, answer
from megatron_bagel.inference.batch.run import run_prompts
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import KeyedNoise
from megatron_bagel.inference.core.sampling import TextSampling
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed


def answers(folder: Path, ranks: int, experts: int = 1) -> list[tuple]:
    from megatron_bagel.inference.core.load_engine import LoadOptions, load_engine

    options = LoadOptions(vae_transform=(32, 16), vit_transform=(42, 14), tensor_parallel=ranks, expert_parallel=experts)
    engine = load_engine(folder, options)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    requests = [
        Request(("a red circle",), size=(16, 24)),
        Request((picture, "make the square blue"), think=True),
        Request((picture, "what color is it?"), output="text"),
    ]
    noise = [KeyedNoise(number) for number in range(len(requests))]
    made = answer(engine, requests, noise, TextSampling(max_length=6), ImageSampling(num_timesteps=4))
    return [(each.text and each.text.ids, each.thought and each.thought.ids, each.latents) for each in made]


# Four ranks are more than the model's two key/value heads, and do not divide its vocabulary's 313 rows evenly.
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_parallel_equals_one_process(tiny_folder: Path, ranks: int) -> None:
    (alone,) = run_ranks(answers, 1, tiny_folder, 1)
    for shared in run_ranks(answers, ranks, tiny_folder, ranks):
        for (text, thought, latents), (their_text, their_thought, their_latents) in zip(shared, alone, strict=True):
            assert (text, thought) == (their_text, their_thought)
            if latents is not None:
                np.testing.assert_allclose(latents, their_latents, atol=1e-5, rtol=1e-5)


def generate(arguments: list[str]) -> int:
    args = parse_arguments(arguments)
    return run_prompts(args, collect_prompts(args))


def test_copies_of_the_model_share_the_prompts(tiny_folder: Path, tmp_path: Path) -> None:
    argv = ["--model", str(tiny_folder), "--prompt", "a", "b", "c", "--image-size", "16x16", "--num-timesteps", "3", "--batch-size", "1"]
    for ranks in (1, 2):
        assert run_ranks(generate, ranks, [*argv, "--out", str(tmp_path / str(ranks))]) == [3] * ranks
    one, two = ((tmp_path / name / "results.jsonl").read_text() for name in "12")
    assert one == two and len(one.splitlines()) == 3
    for name in ("00000.png", "00001.png", "00002.png"):
        first, second = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in "12")
        assert np.abs(first - second).max() <= 1
