# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps against the recorded ones: the product's own training step on recorded batches, rates, norms, weights, averages.

Where a gradient element is below 1e-6 its rounding decides the update (eps is 1e-15, so AdamW takes almost the sign), in the
original as here: such elements are left out of elementwise comparisons, and tensors that consist mostly of them out of the
comparison of norms. (Key biases of the vision transformer are such: softmax does not see them, their true gradient is zero.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.data.loading.loader import StepBatch
from megatron_bagel.data.loading.planned_steps import BatchTotals
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from megatron_bagel.model.positions import sincos_2d
from megatron_bagel.training.losses import LossWeights
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.lr_schedule import LearningRate, ScheduleSettings
from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, wrap_ddp
from megatron_bagel.training.step import StepResult, StepSettings, Trainable, train_step
from tools.golden_cases import TrainCases
from tools.golden_common import Comparison, present
from tools.golden_model import Parts

# Gradients smaller than this are rounding noise to AdamW with eps 1e-15 (advice of the goldens' README).
NOISE = 1e-6


def _main_gradient(parameter: Any) -> Tensor:
    """The gradient in the buffer that Megatron-Core gave the parameter."""
    return parameter.main_grad


@dataclass
class OptimizerRun:
    """Wrapped modules with optimizer, schedule and average, as the training loop has them."""

    parts: Parts
    trainable: Trainable
    clip: float
    #: Under recorded names: True where some step's gradient was too small to compare its update.
    noisy: dict[str, Tensor] = field(default_factory=dict)

    def step(self, cases: TrainCases, name: str) -> StepResult:
        """Train on one batch."""
        batch = cases.batch(name)
        image_encoder = cases.image_encoder(self.parts, batch)
        image_encoder.tower = self.trainable.tower
        self.trainable.image_encoder = image_encoder
        settings = StepSettings(LossWeights(), cases.backend, batch.pack.sequence_length, platform.device())
        result = train_step(
            self.trainable, StepBatch([batch.loaded], BatchTotals(1, len(batch.loaded.plan.samples), batch.loaded.plan.cost)), settings
        )
        # Clipping scaled the gradients in place; the threshold is about those before it.
        scale = min(1.0, self.clip / (result.outcome.grad_norm + 1e-6))
        for parameter, gradient in self.parts.by_recorded_name(_main_gradient).items():
            scaled = present(gradient, f"gradient of {parameter}") / scale
            small = (scaled.abs() < NOISE) & (scaled != 0)
            self.noisy[parameter] = small | self.noisy.get(parameter, torch.zeros_like(small))
        return result

    def weights(self) -> dict[str, Tensor]:
        """Every weight under its recorded name, position tables included."""
        weights = self.parts.by_recorded_name(torch.Tensor.detach)
        return {**{name: present(weight, name) for name, weight in weights.items()}, **self.tables()}

    def averages(self) -> dict[str, Tensor]:
        """Every average under its recorded name; a table's is the table."""
        found: dict[str, Tensor] = self.tables()
        for name, whole in self.trainable.ema.named_full_tensors():
            entry = self.parts.weight_map.entries[name.split(".", 1)[1]]
            found.update(zip(entry.hf, entry.unfuse(whole.cpu()), strict=True))
        return found

    def tables(self) -> dict[str, Tensor]:
        """The fixed position tables, as an export writes them."""
        return {name: sincos_2d(table.width, table.side) for name, table in self.parts.weight_map.tables.items()}


def start(cases: TrainCases, want: Mapping[str, Any]) -> OptimizerRun:
    """The training loop's objects with the settings that were recorded."""
    recorded, parts = want["settings"], cases.model.parts()
    settings = OptimizerSettings(
        lr=recorded["lr"], beta1=want["betas"][0], beta2=want["betas"][1], eps=want["eps"], max_grad_norm=recorded["clip"]
    )
    config = transformer_config(parts.arch.llm, on_cpu=not platform.has_gpu())
    decoder, tower = wrap_ddp(config, [parts.decoder, parts.vision], settings)
    optimizer = build_optimizer([decoder, tower], settings)
    schedule = ScheduleSettings(lr=recorded["lr"], warmup_steps=recorded["warm"], zero_lr_first_step=True)
    rate, ema = LearningRate(optimizer, schedule), ShardedEma({"decoder": decoder, "vision": tower}, optimizer, recorded["ema"])
    # Every step brings the image encoder of its batch.
    placeholder = ImageEncoder(parts.arch, None, None, ImageEncoderSettings(seed=0))
    return OptimizerRun(parts, Trainable(config, [decoder], tower, placeholder, optimizer, rate, ema), recorded["clip"])


def optimizer_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Some steps; after each its losses, norm and rate, and the tensors where they were recorded; at the end the norm of everything."""
    check.same("weight decay", want["weight_decay"], 0)
    run = start(cases, want)
    for recorded in want["steps"]:
        result, step = run.step(cases, recorded["batch"]), recorded["step"]
        got = {"ce": result.losses.ce, "mse": result.losses.mse, "loss": result.losses.loss}
        got.update(total_norm=result.outcome.grad_norm, lr=result.lr)
        for key, value in got.items():
            check.norms(f"{key} of step {step}", value, recorded[key])
        file = cases.goldens / "train" / f"{name}_step{step}.safetensors"
        if file.is_file():
            compare_tensors(check, run, load_file(file), f"after step {step}")
    compare_norms(check, run, run.weights(), want["param_norms"], "weight")
    compare_norms(check, run, run.averages(), want["ema_norms"], "average")


def compare_tensors(check: Comparison, run: OptimizerRun, recorded: Mapping[str, Tensor], when: str) -> None:
    """Weights (``param.*``) and averages (``ema.*``), elements with gradients of rounding size left out."""
    ours = {"param": run.weights(), "ema": run.averages()}
    for key, tensor in recorded.items():
        kind, name = key.split(".", 1)
        sure = ~run.noisy[name]
        check.close(f"{key} {when}", ours[kind][name][sure], tensor[sure])


def compare_norms(check: Comparison, run: OptimizerRun, ours: Mapping[str, Tensor], recorded: Mapping[str, float], what: str) -> None:
    """Norms of every tensor whose gradients were more than rounding; the others are named in the report."""
    check.same(f"names of {what}s", sorted(ours), sorted(recorded))
    rounding = {name for name, small in run.noisy.items() if float(small.float().mean()) > 0.5}
    for name, norm in recorded.items():
        if name not in rounding:
            check.norms(f"norm of {what} {name}", ours[name].double().norm(), norm)
    if rounding:
        check.notes.append(f"{what}s not compared, as their gradient is rounding: {', '.join(sorted(rounding))}")


def learning_rate_case(cases: TrainCases, check: Comparison, name: str, want: dict[str, Any]) -> None:
    """Rates of both schedules as steps used them, with the original's first step of rate 0."""
    for style in ("constant", "cosine"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        schedule = ScheduleSettings(want["lr"], want["min_lr"], want["warmup_steps"], want["total_steps"], style, zero_lr_first_step=True)
        rate, used = LearningRate(optimizer, schedule), []
        for _ in want[style]:
            used.append(rate.lr)
            rate.step()
        # Past the last step of a run the original's cosine rises again; ours stays at the minimum.
        compared = len(used) if style == "constant" else min(len(used), want["total_steps"] + 1)
        check.norms(style, used[:compared], want[style][:compared])
