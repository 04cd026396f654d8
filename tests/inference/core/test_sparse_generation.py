# SPDX-License-Identifier: Apache-2.0
"""Generation with sparse experts: what holds for the dense engine holds for one whose MLPs are experts of either kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_bagel.config.architecture import SparseArch
from tests.distributed import run_ranks
from tests.inference.core.test_engine import (  # noqa: F401 - the same tests, with the folder below
    test_cached_logits_equal_uncached,
    test_velocity_under_a_context_equals_the_training_path,
)
from tests.inference.core.test_tensor_parallel import answers
from tests.inference.tiny_model import tiny_arch, write_tiny_model


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = tiny_arch()
    sparse = SparseArch(6, 2, 24, mlp_only_layers=(0,), shared_expert_intermediate_size=8, shared_expert_gate=True)
    return write_tiny_model(tmp_path_factory.mktemp("sparse"), replace(arch, llm=replace(arch.llm, sparse=sparse)))


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_divide_experts_say_and_draw_what_one_process_does(tiny_folder: Path) -> None:
    """Two ranks with three experts each, and two ranks that split every expert; caches, shared expert and a dense layer included."""
    (alone,) = run_ranks(answers, 1, tiny_folder, 1)
    for experts in (2, 1):
        for shared in run_ranks(answers, 2, tiny_folder, 2, experts):
            for (text, thought, latents), (their_text, their_thought, their_latents) in zip(shared, alone, strict=True):
                assert (text, thought) == (their_text, their_thought)
                if latents is not None:
                    np.testing.assert_allclose(latents, their_latents, atol=1e-5, rtol=1e-5)
