# SPDX-License-Identifier: Apache-2.0
"""The compiled encoder gives the moments of the plain one, and is not compiled for each size of image.

One test traces it (backend ``aot_eager``), which takes seconds. The one that compiles in earnest is slow, and has a process of its own,
because a process with the compiler's threads must not fork ranks for later tests.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_bagel.config.kernel_rules import missing_for_compiling
from tests.distributed import run_ranks
from tests.encoders.helpers import small_autoencoder

#: One image, several of one size, squares, and others. Smaller ones would have other convolutions on a CPU, and be compiled for them.
CALLS = [[(96, 112)], [(96, 112)] * 2, [(128, 96), (96, 96), (112, 112), (112, 112), (96, 144)], [(112, 96)] * 3]
#: One image or several, square or not.
MAX_COMPILATIONS = 4


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def compare(backend: str) -> int:
    """Compare all calls with the plain kernels, and return how often the encoder was compiled."""
    counter = CompileCounterWithBackend(backend)
    plain = small_autoencoder()
    compiled = copy.deepcopy(plain).use_kernels("compiled", backend=counter)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    generator = torch.Generator().manual_seed(0)
    for sizes in CALLS:
        images = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in sizes]
        for ours, theirs in zip(compiled.encode_many(images), plain.encode_many(images), strict=True):
            for one, two in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(two.abs().max()))
    return int(counter.frame_count)


def test_traced() -> None:
    assert compare("aot_eager") <= MAX_COMPILATIONS


@pytest.mark.slow
@pytest.mark.skipif(missing_for_compiling(has_gpu=False) is not None, reason="this machine has no compiler")
def test_compiled() -> None:
    assert run_ranks(compare, 1, "inductor", parallel={})[0] <= MAX_COMPILATIONS
