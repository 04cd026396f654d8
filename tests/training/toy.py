# SPDX-License-Identifier: Apache-2.0
"""Two small modules, a schedule of random gradients, and plain torch that does the same: what optimizer and EMA tests share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, finalize_gradients, optimizer_step, wrap_ddp

GROUPS_READY = {"tensor_model_parallel_size": 1}


def config(bf16: bool = False) -> TransformerConfig:
    """The least Megatron needs to know."""
    return TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True, bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip


def modules(frozen: str = "") -> dict[str, nn.Module]:
    """A decoder and a vision stand-in of odd sizes, the same on every rank; ``frozen`` names one to freeze."""
    torch.manual_seed(5)
    made = {"decoder": nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False)), "vision": nn.Sequential(nn.Linear(3, 11))}
    for name, module in made.items():
        module.requires_grad_(name != frozen)
    return made


class Run:
    """Wrapped modules and their optimizer; ``step`` feeds this rank's share of gradients that are known for the whole world."""

    def __init__(self, settings: OptimizerSettings, frozen: str = "") -> None:
        plain = modules(frozen)
        if settings.bf16:
            for module in plain.values():
                module.bfloat16()
        wrapped = wrap_ddp(config(settings.bf16), list(plain.values()), settings)
        self.modules: dict[str, DistributedDataParallel] = dict(zip(plain, wrapped, strict=True))
        self.optimizer: MegatronOptimizer = build_optimizer(wrapped, settings)

    def step(self, number: int) -> float:
        """One update; returns the gradient norm before clipping."""
        for module in self.modules.values():
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        rank, world = parallel_state.get_data_parallel_rank(), dist.get_world_size()
        for name, gradient in gradients(self.modules["decoder"].module, self.modules["vision"].module, number).items():
            prefix, _, rest = name.partition(".")
            parameter = self.modules[prefix].module.get_parameter(rest)
            share = torch.rand(world, generator=torch.Generator().manual_seed(number))
            # As a backward pass would: through autograd, so that DDP's hooks run.
            (parameter.float() * gradient * (share[rank] / share.sum())).sum().backward()
        finalize_gradients(list(self.modules.values()))
        outcome = optimizer_step(self.optimizer)
        assert outcome.updated
        return outcome.grad_norm

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight, by the names the EMA uses."""
        return {
            f"{prefix}.{name}": parameter.detach().clone()
            for prefix, module in self.modules.items()
            for name, parameter in module.module.named_parameters()
        }


def gradients(decoder: nn.Module, vision: nn.Module, number: int) -> dict[str, torch.Tensor]:
    """World gradients of step ``number`` for every trainable parameter."""
    generator = torch.Generator().manual_seed(100 + number)
    both = (("decoder", decoder), ("vision", vision))
    named = [(f"{prefix}.{name}", parameter) for prefix, module in both for name, parameter in module.named_parameters()]
    drawn = {name: torch.randn(parameter.shape, generator=generator) for name, parameter in named}
    return {name: drawn[name] for name, parameter in named if parameter.requires_grad}


def reference(steps: int, settings: OptimizerSettings, decay: float, frozen: str = "") -> tuple[dict, dict, list[float]]:
    """Weights, averages and gradient norms by torch's own AdamW and clipping, in one process."""
    plain = modules(frozen)
    named = {f"{prefix}.{name}": p for prefix, module in plain.items() for name, p in module.named_parameters()}
    trained = [p for p in named.values() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in named.items()}
    norms = []
    for number in range(steps):
        for name, gradient in gradients(plain["decoder"], plain["vision"], number).items():
            named[name].grad = gradient.clone()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in trained)).item()
        norms.append(norm)
        if settings.max_grad_norm > 0:
            for parameter in trained:
                parameter.grad *= min(1.0, settings.max_grad_norm / (norm + 1e-6))
        adam.step()
        for name, parameter in named.items():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    return {name: p.detach().clone() for name, p in named.items()}, average, norms
