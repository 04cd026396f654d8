# SPDX-License-Identifier: Apache-2.0
"""``--moe_grouped_gemm`` against a stand-in of Transformer Engine's grouped linear: what it is asked for, and the arithmetic around it.

Not run on a GPU here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.model.test_bagel import MIXED
from tests.model.test_sparse_experts import losses_of, sparse_arch, spread_model
from tests.model.test_te_modules import _GroupedLinear, stand_in  # noqa: F401 - the stand-in's fixture
from tests.model.tiny import microbatch
from tests.strategies import SPEC


@pytest.fixture
def grouped(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811
    import sys

    monkeypatch.delitem(sys.modules, "megatron_bagel.model.te_experts", raising=False)
    yield
    sys.modules.pop("megatron_bagel.model.te_experts", None)


@pytest.mark.usefixtures("single_rank", "grouped")
def test_grouped_experts_equal_sequential_ones() -> None:
    arch = sparse_arch(2, mlp_only_layers=(1,))
    sequential, together = spread_model(arch), spread_model(arch, moe_grouped_gemm=True)
    state = [set(model.state_dict()) for model in (sequential, together)]
    assert state[0] == state[1]
    batches = [microbatch(MIXED, arch, SPEC) for _ in range(2)]
    expected, found = losses_of(sequential, batches[0]), losses_of(together, batches[1])
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    # Two matrices of each kind's experts, each in one call with the rows of all six experts.
    assert [len(rows) for rows in _GroupedLinear.calls] == [6] * 4
    assert [sum(rows) for rows in _GroupedLinear.calls] == [2 * batches[0].n_und] * 2 + [2 * batches[0].n_vae] * 2
