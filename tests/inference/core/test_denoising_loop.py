# SPDX-License-Identifier: Apache-2.0
"""Steps in place are plain Euler steps bit for bit, and a step is the same operations on the same memory: what a graph may replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_bagel.inference.core.capture import WARM_UP, launched_because
from megatron_bagel.inference.core.context import Context, GuidedContext
from megatron_bagel.inference.core.denoising_loop import LEAST_STEPS, DenoisingLoop
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance, guide, time_grid
from megatron_bagel.inference.core.image import generate_latents
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.inference.core.noise import KeyedNoise
from tests.host_waits import HostWaits
from tests.inference.cpu_graphs import CpuGraph, Noted, cpu_graphs, tensors_of  # noqa: F401 - a fixture

GRIDS = [(2, 3), (4, 2)]
#: Without guidance, with it, and without it again: 2, 12 and 5 steps.
BETWEEN = ImageSampling(20, 1.0, Guidance(4.0, 2.0, (0.3, 0.92)))


def contexts_of(engine: Engine, pictures: list[Image.Image]) -> list[GuidedContext]:
    """An edit and a picture from words, in their three views."""
    empty = Context()
    (text,) = engine.add_text([empty], [engine.tokenizer.encode("make the square blue")])
    (looked,) = engine.add_features([empty], pictures[:1])
    (asked,) = engine.add_text([looked], [engine.tokenizer.encode("make the square blue")])
    return [GuidedContext(asked, looked, text), GuidedContext(text, empty, text)]


def noise_of(engine: Engine) -> list[Tensor]:
    return [KeyedNoise(0, n).initial((rows * columns, engine.arch.latent_token_dim)) for n, (rows, columns) in enumerate(GRIDS)]


def plain_steps(engine: Engine, contexts: Sequence[GuidedContext], sampling: ImageSampling) -> list[Tensor]:
    """Euler steps as the formulas have them."""
    x_t, guidance = noise_of(engine), sampling.guidance
    times = time_grid(sampling.num_timesteps, sampling.timestep_shift)
    for t, dt in zip(times[:-1].tolist(), (times[:-1] - times[1:]).tolist(), strict=True):
        embedded = [engine.embed_latents(x, t, engine.latent_position_ids(*grid)) for x, grid in zip(x_t, GRIDS, strict=True)]
        views = [[c.main for c in contexts], [c.without_text for c in contexts], [c.without_images for c in contexts]]
        views = views[: 1 + sum(guidance.needs(t))]
        flat = engine.velocities([c for view in views for c in view], embedded * len(views))
        by_view = [flat[first : first + len(contexts)] for first in range(0, len(flat), len(contexts))]
        if sampling.couple_batch:
            by_view = [[torch.cat(view)] for view in by_view]
        guided = [guide(*v, *[None] * (3 - len(v)), guidance.scales_at(t), guidance) for v in zip(*by_view, strict=True)]
        x_t = [x - v * dt for x, v in zip(x_t, torch.cat(guided).split([len(x) for x in x_t]), strict=True)]
    return x_t


@pytest.mark.parametrize("kind", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("couple", [False, True])
@torch.no_grad()
def test_steps_in_place_are_euler_steps(engine: Engine, pictures: list[Image.Image], kind: str, couple: bool) -> None:
    contexts = contexts_of(engine, pictures)
    sampling = replace(BETWEEN, num_timesteps=7, guidance=replace(BETWEEN.guidance, renorm_type=kind), couple_batch=couple)
    made, expected = generate_latents(engine, contexts, GRIDS, noise_of(engine), sampling), plain_steps(engine, contexts, sampling)
    assert all(map(torch.equal, made, expected))


def signature(noted: Noted) -> list[tuple[Any, ...]]:
    """The operations with their shapes and constants, and where the memory lies that the pass did not make."""
    made: set[int] = set()
    rows = []
    for func, args, kwargs, results in noted.operations:
        given = tensors_of(args, kwargs)
        assert given or func is torch.ops.aten.empty.memory_format, f"{func} takes something from the host"
        places = [None if (t.untyped_storage().data_ptr() in made) else t.data_ptr() for t in given]
        constants = [str(value) for value in (*args, *kwargs.items()) if not tensors_of(value)]
        rows.append((str(func), [tuple(t.shape) for t in given], places, constants))
        made |= {t.untyped_storage().data_ptr() for t in tensors_of(results) if not any(t.data_ptr() == g.data_ptr() for g in given)}
    return rows


@torch.no_grad()
def test_a_step_repeats_operations_and_memory(engine: Engine, pictures: list[Image.Image]) -> None:
    loop = DenoisingLoop(engine, contexts_of(engine, pictures), GRIDS, noise_of(engine), BETWEEN)
    kinds: dict[tuple[float, float], list[list[tuple[Any, ...]]]] = {}
    for time in loop.times:
        with Noted() as noted, HostWaits() as waits:
            loop.step()
        from_host = [func for func, *_ in noted.operations if "lift_fresh" in str(func)]
        first = BETWEEN.guidance.scales_at(time) not in kinds
        if not first:
            assert not waits.places and not from_host
            kinds[BETWEEN.guidance.scales_at(time)].append(signature(noted))
        else:  # the first step of a kind still computes which token belongs to which context
            kinds[BETWEEN.guidance.scales_at(time)] = []
    assert sorted(map(len, kinds.values())) == [6, 11]
    for (_, image_scale), steps in kinds.items():
        assert len(steps[0]) > 50 and all(step == steps[0] for step in steps), image_scale


@pytest.mark.usefixtures("cpu_graphs")
@torch.no_grad()
def test_replayed_steps_equal_launched_ones(engine: Engine, pictures: list[Image.Image]) -> None:
    """One graph for each kind of guidance with enough steps, and none without ``capture``."""
    contexts, often = contexts_of(engine, pictures), replace(BETWEEN, num_timesteps=40)
    assert 7 < LEAST_STEPS <= 12, "seven steps without guidance are launched"
    for sampling, steps in ((BETWEEN, [12]), (often, [24, 15])):
        answers: list[tuple[list[Tensor], list[tuple[int, float, Tensor, Tensor]]]] = []
        for captured in (False, True):
            seen: list[tuple[int, float, Tensor, Tensor]] = []
            CpuGraph.replays = 0
            made = generate_latents(
                engine, contexts, GRIDS, noise_of(engine), replace(sampling, capture=captured), lambda *step, seen=seen: seen.append(step)
            )
            assert CpuGraph.replays == (sum(steps) - WARM_UP * len(steps) if captured else 0)
            answers.append((made, seen))
        (launched, steps_launched), (replayed, steps_replayed) = answers
        assert all(map(torch.equal, launched, replayed))
        for (step, t, x, v), (same_step, same_t, same_x, same_v) in zip(steps_launched, steps_replayed, strict=True):
            assert (step, t) == (same_step, same_t) and torch.equal(x, same_x) and torch.equal(v, same_v)


def test_a_cpu_replays_nothing(engine: Engine) -> None:
    assert launched_because(engine) == "only a GPU replays graphs"
