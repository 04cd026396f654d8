# SPDX-License-Identifier: Apache-2.0
"""Generation with sparse experts: what holds for the dense engine holds for one whose MLPs are experts of either kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bagel.config.architecture import SparseArch
from tests.inference.core.test_engine import (  # noqa: F401 - the same tests, with the folder below
    test_cached_logits_equal_uncached,
    test_velocity_under_a_context_equals_the_training_path,
)
from tests.inference.tiny_model import tiny_arch, write_tiny_model


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny_arch()
    sparse = SparseArch(6, 2, 24, mlp_only_layers=(0,), shared_expert_intermediate_size=8, shared_expert_gate=True)
    return write_tiny_model(tmp_path_factory.mktemp("sparse"), replace(arch, llm=replace(arch.llm, sparse=sparse)))
