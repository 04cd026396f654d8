# SPDX-License-Identifier: Apache-2.0
"""Settings every test shares: the CPU platform in place before Megatron-Core is used, one thread, where the goldens lie."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its thread pool, which forked ranks could not use, and because all ranks share few cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import hypothesis
import pytest

from megatron_bagel import platform

platform.install()
# Times of a single example mean nothing while all ranks of a test share two cores.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that start several processes first: a long file that begins last keeps one process of the suite busy alone."""
    files = {item.path for item in items if item.get_closest_marker("distributed") is not None}
    items.sort(key=lambda item: item.path not in files)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Return the folder with numbers recorded from the original implementation: ``tests/goldens``, or what the environment names."""
    folder = Path(os.environ.get("MEGATRON_BAGEL_GOLDENS", ROOT / "tests" / "goldens"))
    assert folder.is_dir(), f"{folder}, which MEGATRON_BAGEL_GOLDENS names, is no folder"
    return folder


@pytest.fixture
def single_rank() -> Iterator[None]:
    """This process as a world of one rank with Megatron-Core's groups and random states, for tests that need no second rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed

    init_distributed()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    shutdown_distributed()
    # A backward pass without a schedule leaves a scale of another shape than schedules set; ranks that a later test forks would inherit it.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    # A model of the test may hold groups in a cycle; their threads must be gone before a later test forks ranks.
    gc.collect()
