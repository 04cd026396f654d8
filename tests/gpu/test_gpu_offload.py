# SPDX-License-Identifier: Apache-2.0
"""The optimizer in host memory on a GPU: the numbers of the run without it, before and after a resume, with less memory on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.commands import train
from tests.runs import make_world

# Megatron-Core's optimizer in host memory asks for it, and a run without it is refused.
pytest.importorskip("transformer_engine")

NUMBERS = ("loss", "ce", "mse", "grad_norm")
OFFLOAD = {
    "all": {"optimizer_cpu_offload": True},
    "half": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    "overlap": {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def on_gpu(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Mapping[str, Any]]:
    return train(world, tmp_path_factory.mktemp("plain"), bf16=True)


def near(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    """Kernels add in any order, and the two AdamWs round differently."""
    assert len(ours) == len(theirs) == 4
    for record, other in zip(ours, theirs, strict=True):
        assert [record[name] for name in NUMBERS] == pytest.approx([other[name] for name in NUMBERS], rel=2e-3)


@pytest.mark.parametrize("flags", OFFLOAD.values(), ids=OFFLOAD)
def test_the_numbers_are_those_without_offload(world: Path, on_gpu: Any, tmp_path: Path, flags: dict[str, Any]) -> None:
    history = train(world, tmp_path, bf16=True, **flags)
    near(history, on_gpu)
    assert history[-1]["peak_mem_bytes"] < on_gpu[-1]["peak_mem_bytes"]


def test_runs_go_on_with_and_without_it(world: Path, on_gpu: Any, tmp_path: Path) -> None:
    for name, first, second in (("there", {}, OFFLOAD["all"]), ("back", OFFLOAD["half"], {})):
        train(world, tmp_path / name, bf16=True, total_steps=2, **first)
        near(train(world, tmp_path / name, bf16=True, **second), on_gpu)
