# SPDX-License-Identifier: Apache-2.0
"""Layouts nobody thought of: whatever the checks let through gives the numbers and the weights of one process.

A longer, named run: ``pytest -m slow tests/training/test_random_layouts.py``. ``MEGATRON_BAGEL_EXAMPLES`` says how many layouts.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import architecture
from megatron_bagel.config.validate import validate_architecture
from tests.runs import run_config
from tests.training.equal_runs import COMM, CP, OVERLAP, PP, SETTINGS, SP, TP, VPP, Reference, assert_equal, trained, world_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(7200)]

EXAMPLES = int(os.environ.get("MEGATRON_BAGEL_EXAMPLES", "12"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(world, tmp_path_factory.mktemp("reference"))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """(ranks, flags): any sizes with at most 8 ranks, and what may be switched on beside them."""
    tp, pp, cp, dp = (draw(st.sampled_from([1, 2, 4, 8] if axis == "tp" else [1, 2, 4])) for axis in ("tp", "pp", "cp", "dp"))
    assume(1 < tp * pp * cp * dp <= 8)
    flags: dict[str, Any] = {TP: tp, PP: pp, CP: cp, SP: tp > 1 and draw(st.booleans())}
    if pp > 1 and draw(st.booleans()):
        flags[VPP] = 4 // pp
    if cp > 1 and draw(st.booleans()):
        flags[COMM] = "a2a"
    if draw(st.booleans()):
        flags |= OVERLAP
    elif draw(st.booleans()):
        flags["use_distributed_optimizer"] = False
    if dp > 1 and flags.get("use_distributed_optimizer", True) and draw(st.booleans()):
        flags["num_distributed_optimizer_instances"] = 2
    if draw(st.booleans()):
        flags["recompute_granularity"] = draw(st.sampled_from(["full", "selective"]))
    return tp * pp * cp * dp, flags


def allowed(world: Path, ranks: int, flags: dict[str, Any]) -> bool:
    """Whether the checks let these settings through."""
    try:
        config: Config = run_config(world, world, ranks, **{**SETTINGS, **flags})
        validate_architecture(config, architecture(config))
    except ValueError:
        return False
    return True


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), print_blob=True)
@given(layout=layouts())
def test_random_layouts_equal_one_process(world: Path, reference: Reference, layout: tuple[int, dict[str, Any]]) -> None:
    ranks, flags = layout
    assume(allowed(world, ranks, flags))
    print(f"{ranks} ranks: {flags}")
    expected = {} if flags.get("use_distributed_optimizer", True) else {"use_distributed_optimizer": False}
    with tempfile.TemporaryDirectory() as folder:
        assert_equal(trained(world, Path(folder), ranks, flags), reference.run(expected))
