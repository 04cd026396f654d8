# SPDX-License-Identifier: Apache-2.0
"""What a run shows of its model is what generation makes of it: the uncached passes of training against the cached ones of inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.runs import make_world, open_run, run_config

pytestmark = pytest.mark.distributed


@dataclass
class ProbeNoise:
    """The noise of a probe's validation, under the names that generation asks for."""

    probe: Any
    seed: int

    def initial(self, shape: tuple[int, ...]) -> torch.Tensor:
        from megatron_bagel.data.keyed_random import keyed_normal

        return keyed_normal(shape, self.seed, "probe", self.probe.name)

    def posterior(self, shape: tuple[int, ...]) -> torch.Tensor:
        from megatron_bagel.data.keyed_random import keyed_normal

        sample, (image,) = self.probe.sample, [item.image for item in self.probe.conditions if item.kind == "vae"]
        return keyed_normal(shape, self.seed, sample.dataset, sample.index, sample.epoch, "posterior", image, "clean")

    def text(self) -> np.random.Generator:
        return np.random.default_rng(0)


def both_ways(config: Any) -> list[tuple[str, Any, Any]]:
    """(probe, training's answer, generation's answer) of every probe."""
    from megatron_bagel.data.transforms import TransformArgs, decode_rgb
    from megatron_bagel.inference.batch.requests import Request, answer
    from megatron_bagel.inference.core.engine import Engine
    from megatron_bagel.inference.core.sampling import TextSampling

    run = open_run(config)
    decoder = run.trained.modules["decoder"]
    with torch.no_grad():
        # Zero in a fresh model, which would make every velocity zero.
        decoder.llm2vae.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    run.trainable.optimizer.reload_model_params()
    run.trainable.ema.reset()
    evaluation = run.evaluation
    ours = evaluation.answers(run.trainable, run.settings)
    image_encoder = run.trainable.image_encoder
    transforms = TransformArgs(64, 64, 16), TransformArgs(70, 70, 14)
    engine = Engine(decoder, run.trained.modules["vision"], image_encoder.autoencoder, evaluation.tokenizer, run.arch, *transforms)
    found = []
    for result in ours:
        probe = evaluation.probes[result.number]
        reader, row, _ = evaluation.sources[probe.source]._locate(probe.index, 0)
        shown = [item.image for item in probe.conditions if item.kind == "vit"]
        terms = [decode_rgb(reader.image_bytes(row, image)) for image in shown]
        terms += [item.ids for item in probe.conditions if item.kind == "text"]
        size = (probe.target.height, probe.target.width) if probe.draws else None
        request = Request(tuple(terms), "image" if probe.draws else "text", size=size)
        sampling = TextSampling(max_length=evaluation.max_answer_tokens + 1)
        (theirs,) = answer(engine, [request], [ProbeNoise(probe, config.training.global_seed)], sampling, evaluation.sampling)
        if probe.draws:
            found.append((probe.group, result.picture, theirs.image))
        else:
            found.append((probe.group, result.text, evaluation.tokenizer.decode(theirs.text.ids[1:])))
    run.loader.close()
    run.log.close()
    return found


def test_samples_of_a_run_are_what_generation_makes(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    flags = {"split": "75,25", "eval_every": 1, "eval_pictures": 2, "eval_timesteps": 5, "eval_cfg_img_scale": 2.0, "eval_answer_tokens": 4}
    (found,) = run_ranks(both_ways, 1, run_config(world, tmp_path / "results", **flags))
    groups = [group for group, _, _ in found]
    assert {"t2i_pretrain", "unified_edit", "vlm_sft"} <= set(groups)
    for group, ours, theirs in found:
        if isinstance(ours, str):
            assert ours == theirs
        else:
            assert np.ptp(ours) > 10, "a flat picture would show nothing"
            # Pixels are rounded down: values at an edge may fall to either side.
            assert np.abs(ours.astype(int) - theirs).max() <= 1, group
