# SPDX-License-Identifier: Apache-2.0
"""A step makes the host wait for the device only to judge itself: a wait leaves a GPU without work while the host prepares more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.config.parser import Config
from tests.distributed import run_ranks
from tests.host_waits import HostWaits
from tests.runs import make_world, open_run, run_config

pytestmark = pytest.mark.distributed

#: Packs of a step. What waits for each of them is above the bounds.
PACKS = 6
LOG_EVERY = 100
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
#: The norms of the gradients and the losses, which judge the step.
NORM, LOSSES = "clip_grads: get_grad_norm_fp32", "losses: global_losses"
#: Waits for other hosts, beside the training stream.
COUNTS = "host_sums: sum_over_hosts"
#: Megatron-Core compares the states of the CPU's generator, which are on the CPU.
OF_THE_CPU = "random: fork"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one-chunked": (1, {"encoder_memory": "constant", "encoder_chunk_tokens": 30, "ce_chunk_tokens": 8}),
    "one-pass-bf16": (1, {"bf16": True, "one_pass_optimizer": True, "optimizer_state_dtype": "bf16"}),
    "recompute": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, "recompute_vit": True}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True, "overlap_vae_encode": True}),
    "cp2": (2, {CP: 2}),
    "tp2-sp-pp2": (4, {TP: 2, "sequence_parallel": True, PP: 2, "ce_chunk_tokens": 8}),
}


def waits(config: Config) -> list[dict[str, int]]:
    """The waits by place of a logged step, and of the next step with hooks and log, which it does not write."""
    from megatron_bagel.training.loop import advance, next_batch, step

    run = open_run(config)
    with run.hooks:
        advance(run)  # starts the loader, whose seed is a number of the CPU
        with HostWaits() as logged:
            step(run, next_batch(run), run.step_log.table(LOG_EVERY - 1))
        with HostWaits() as whole:
            advance(run)
    run.loader.close()
    return [dict(logged.places), dict(whole.places)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_waits_only_to_be_judged(world: Path, tmp_path: Path, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    config = run_config(world, tmp_path, ranks, global_batch_size=PACKS, log_every=LOG_EVERY, **flags)
    for steps in run_ranks(waits, ranks, config):
        for places in steps:
            assert set(places) <= {NORM, LOSSES, COUNTS, OF_THE_CPU}
            assert places[LOSSES] == 1 and places[NORM] <= 2 and places.get(COUNTS, 0) <= 2


def test_waits_are_seen() -> None:
    """The counter itself: every way to read a value, none of those that only queue work."""
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    reads = [
        lambda: float(values[0]), lambda: values.sum().item(), lambda: bool(mask[0]), lambda: values[mask], lambda: mask.nonzero(),
        lambda: values.unique(), lambda: values.tolist(), lambda: values.cpu(), lambda: torch.cuda.synchronize(),
        lambda: torch.equal(values, values), lambda: values.masked_select(mask), lambda: values.index_put((mask,), values[:2]),
    ]  # fmt: skip
    for read in reads:
        with HostWaits() as seen:
            read()
        assert sum(seen.places.values()) == 1
    with HostWaits() as seen:
        values[torch.tensor([0, 2])], values.clone().masked_fill_(mask, 0.0), torch.where(mask, values, 0.0), values.gather(0, mask.long())
        values.clone()[mask] = 0.0
    assert not seen.places
