# SPDX-License-Identifier: Apache-2.0
"""Our Adam equals torch's AdamW, keeps ``step`` in the group, and lets a distributed optimizer load what it saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.platform.cuda_on_cpu.fused_adam import StepInGroupAdam
from tests.distributed import run_ranks


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([0.0, 0.1]), st.integers(0, 100))
def test_equals_torch_adamw(sizes, weight_decay, seed):
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(size, generator=generator) for size in sizes]
    ours, theirs = [[value.clone().requires_grad_() for value in start] for _ in range(2)]
    options = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-15, weight_decay=weight_decay)
    optimizers = StepInGroupAdam(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 3
    assert set(optimizers[0].state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_a_group_without_gradients_counts_steps_too():
    optimizer = StepInGroupAdam([torch.zeros(2, requires_grad=True)])
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1 and not optimizer.state


def _train_save_load(bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two steps, state out, one step; the same again from the saved state in a fresh optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, params_dtype=dtype, bf16=bf16)

    class Model(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.linear = torch.nn.Linear(8, 8, dtype=dtype)

    def build():
        torch.manual_seed(0)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        model = DistributedDataParallel(config, ddp_config, Model())
        options = OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=True, bf16=bf16, params_dtype=dtype)
        (optimizer,) = get_megatron_optimizer(options, [model]).chained_optimizers
        return model, optimizer

    def step(model, optimizer, n: int) -> None:
        model.zero_grad_buffer()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(n)).to(dtype)
        model.module.linear(x).float().square().mean().backward()
        model.finish_grad_sync()
        assert optimizer.step()[0]

    def weights(model) -> torch.Tensor:
        return model.module.linear.weight.detach().float().clone()

    model, optimizer = build()
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    saved = optimizer.state_dict(), optimizer.get_parameter_state_dp_zero()
    model_state = {name: value.clone() for name, value in model.module.state_dict().items() if value is not None}
    step(model, optimizer, 2)
    fresh_model, fresh = build()
    fresh_model.module.load_state_dict(model_state)
    with torch.no_grad():  # in fp32 the main weights are views of parameters that require gradients
        fresh.load_state_dict(saved[0])
        fresh.load_parameter_state_from_dp_zero(saved[1])
    step(fresh_model, fresh, 2)
    return weights(model), weights(fresh_model)


@pytest.mark.distributed
@pytest.mark.parametrize("bf16", [False, True])
def test_the_distributed_optimizer_continues_from_its_saved_state(bf16):
    for continued, loaded in run_ranks(_train_save_load, 2, bf16, parallel={}):
        assert torch.equal(continued, loaded)
