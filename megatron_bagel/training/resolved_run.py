# SPDX-License-Identifier: Apache-2.0
"""A run as the flags resolve it. The entry point makes it once (``cli/resolve_run.py``); everything below takes it, or a part of it.

No part is the configuration. Each component has settings of its own, defined beside it, so it can be built and tested without flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bagel.assembly.modules import BuildSettings
from megatron_bagel.assembly.starting_weights import StartSettings
from megatron_bagel.checkpoint.dist.local_files import LocalCheckpointSettings
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.config.resolve import ResolvedSizes
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.data.loading.settings import DataSettings
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.encoders.image_encoding import ImageEncoderSettings
from megatron_bagel.training.evaluation.evaluator import EvaluationSettings
from megatron_bagel.training.loop import LoopSettings
from megatron_bagel.training.observability.logging_sinks import WandbSettings
from megatron_bagel.training.observability.step_log import StepLogSettings
from megatron_bagel.training.observability.trackers import TrackerSettings
from megatron_bagel.training.optim.lr_schedule import ScheduleSettings
from megatron_bagel.training.optim.optimizer import OptimizerSettings
from megatron_bagel.training.resilience.run_monitors import ResilienceSettings
from megatron_bagel.training.saving import SavingSettings
from megatron_bagel.training.step import StepSettings


@dataclass(frozen=True)
class ResolvedRun:
    """Describes every part of a run before anything is built.

    Attributes:
        record: The configuration as plain values, which checkpoints and ``config.yaml`` keep. No code decides anything by it.
        arch: The model; its vocabulary holds every token of ``tokenizer``.
        tokenizer: The tokenizer of the run.
        megatron: Parallel sizes, precision and recomputation, under Megatron-Core's names.
        sizes: The batch sizes, replicas and types that follow from these on the ranks of the run.
        seed: The seed of every random draw.
        results_dir: The folder of logs and metrics.
        data: The settings of the loader.
        start: The settings of the starting point.
        build: The settings of the modules.
        encoding: The settings of the image encoders.
        optimizer: The settings of the optimizer.
        schedule: The settings of the learning rate.
        step: The settings of the step.
        loop: The settings of the loop.
        step_log: The settings of the log.
        saving: The settings of checkpoints and exports.
        resilience: The settings of what watches for failures.
        observing: The settings of profiler and timers.
        ema_decay: The decay of the moving average of the weights.
        max_skipped_share: The share of unreadable samples above which the run ends.
        peak_device_tflops: The peak rate of a device; 0 looks it up by the device's name.
        local_checkpoints: The settings of local checkpoints, or None without them.
        evaluation: The settings of evaluations, or None for a run without them.
        wandb: The settings of W&B, or None without it.
        trackers: The settings of MLflow and trackio.
        ema_warmup: Whether the decay rises with the steps done.
        new_tokens: The tokens, by id, whose rows of the vocabulary start from seeded values although the other weights are trained.
    """

    record: Mapping[str, Any]
    arch: BagelArch
    tokenizer: Tokenizer
    megatron: MegatronArguments
    sizes: ResolvedSizes
    seed: int
    results_dir: Path
    data: DataSettings
    start: StartSettings
    build: BuildSettings
    encoding: ImageEncoderSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    ema_decay: float
    step: StepSettings
    loop: LoopSettings
    step_log: StepLogSettings
    max_skipped_share: float
    peak_device_tflops: float
    saving: SavingSettings
    resilience: ResilienceSettings
    observing: ObservingArguments
    local_checkpoints: LocalCheckpointSettings | None = None
    evaluation: EvaluationSettings | None = None
    wandb: WandbSettings | None = None
    trackers: TrackerSettings = TrackerSettings()
    ema_warmup: bool = False
    new_tokens: Mapping[int, str] = field(default_factory=dict)

    @property
    def costs(self) -> CostInputs:
        """Return the inputs of the cost formulas for a step of this run."""
        return CostInputs(self.arch, self.megatron, self.sizes, self.data.packs.max_num_tokens, self.build.frozen)
