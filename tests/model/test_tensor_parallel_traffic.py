# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism costs one gather and one reduce-scatter per half layer, forward and backward, for both experts together."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.profiler import ProfilerActivity, profile

from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.model.build import build_decoder
from tests.distributed import run_ranks
from tests.model.test_bagel import KINDS, MIXED
from tests.model.tiny import microbatch, tiny_arch
from tests.strategies import SPEC

pytestmark = pytest.mark.distributed
TP2 = {"tensor_model_parallel_size": 2}
GATHER, SCATTER, SUM = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"


def _calls(kind: str, sequence_parallel: bool, layers: int) -> Counter[str]:
    """Collectives of one forward and backward pass."""
    arch = tiny_arch(kind, num_hidden_layers=layers)
    model = build_decoder(arch, transformer_config(arch.llm, MegatronArguments(**TP2, sequence_parallel=sequence_parallel)))
    batch = microbatch(MIXED, arch, SPEC)
    batch = microbatch(MIXED, arch, SPEC, padding=batch.length % 2)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        ce, mse = model(batch)
        (ce.sum() + mse.sum()).backward()
    return Counter(event.name for event in recorded.events() if event.name in (GATHER, SCATTER, SUM))


def _calls_per_layer(kind: str, sequence_parallel: bool) -> dict[str, int]:
    one, three = (_calls(kind, sequence_parallel, layers) for layers in (1, 3))
    return {name: (three[name] - one[name]) // 2 for name in three | one}


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_a_layer_exchanges_twice_each_way(kind: str) -> None:
    """Half a layer gathers and scatters going forward; going backward each turns into the other. Without it: one sum each way."""
    for calls in run_ranks(_calls_per_layer, 2, kind, True, parallel=TP2):
        assert calls == {GATHER: 4, SCATTER: 4, SUM: 0} or calls == {GATHER: 4, SCATTER: 4}, calls
    for calls in run_ranks(_calls_per_layer, 2, kind, False, parallel=TP2):
        assert calls[SUM] == 4 and not calls.get(GATHER) and not calls.get(SCATTER), calls
