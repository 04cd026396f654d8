# SPDX-License-Identifier: Apache-2.0
"""Records updates as the trainer makes them: AdamW, clipping, warm-up, the moving average, and the learning rates of both schedules."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.optimization import get_constant_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup

from tools.record_goldens.data import Batch
from tools.record_goldens.files import GoldenFolder
from tools.record_goldens.model import ModelSource
from tools.record_goldens.parameters import updated_parameters
from tools.record_goldens.step import Trainer, losses, numbers

_BETAS, _EPS = (0.9, 0.95), 1e-15
_STEPS = 3


def optimizer_case(
    name: str, settings: dict[str, float], models: ModelSource, trainer: Trainer, batches: tuple[Batch, Batch], folder: GoldenFolder
) -> dict[str, Any]:
    """Return three steps over two batches in turn; the case ``optim_base`` also writes parameters after the first and the last."""
    model, autoencoder = models.load()
    average = deepcopy(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=settings["lr"], betas=_BETAS, eps=_EPS, weight_decay=0)
    schedule = get_constant_schedule_with_warmup(adam, num_warmup_steps=int(settings["warm"]))
    log = []
    for step in range(_STEPS):
        batch = f"flex_{step % 2}"
        (result,) = losses([trainer.run(model, autoencoder, batches[step % 2], batch)])
        result["loss"].backward()
        rate = adam.param_groups[0]["lr"]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings["clip"])
        adam.step()
        schedule.step()
        _average(average, model, settings["ema"])
        adam.zero_grad()
        log.append({"step": step, "batch": batch, "lr": rate, "total_norm": float(norm), **numbers(result)})
        if name == "optim_base" and step in (0, _STEPS - 1):
            kept, averaged = updated_parameters(model)
            weights, averages = dict(model.named_parameters()), dict(average.named_parameters())
            folder.tensors(f"train/{name}_step{step}.safetensors", {
                **{f"param.{key}": weights[key] for key in kept}, **{f"ema.{key}": averages[key] for key in averaged},
            })  # fmt: skip
    return {
        "settings": settings, "betas": list(_BETAS), "eps": _EPS, "weight_decay": 0, "steps": log, "param_norms": _norms(model),
        "ema_norms": _norms(average),
    }  # fmt: skip


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the trained parameters, in two rounded operations as the original does."""
    for kept, parameter in zip(average.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad:
            kept.mul_(decay).add_(parameter, alpha=1 - decay)


def _norms(model: nn.Module) -> dict[str, float]:
    return {name: float(parameter.double().norm()) for name, parameter in model.named_parameters()}


def learning_rates() -> dict[str, Any]:
    """Return the rate of each of 25 steps of both schedules, 5 beyond the last."""
    lr, warmup, total, least = 1e-3, 4, 20, 1e-5

    def used(schedule_of: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
        adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
        schedule, rates = schedule_of(adam), []
        for _ in range(total + 5):
            rates.append(adam.param_groups[0]["lr"])
            adam.step()
            schedule.step()
        return rates

    return {
        "lr": lr, "warmup_steps": warmup, "total_steps": total, "min_lr": least,
        "constant": used(lambda adam: get_constant_schedule_with_warmup(adam, num_warmup_steps=warmup)),
        "cosine": used(
            lambda adam: get_cosine_with_min_lr_schedule_with_warmup(adam, num_warmup_steps=warmup, num_training_steps=total, min_lr=least)
        ),
    }  # fmt: skip
