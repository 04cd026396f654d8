"""Which hooks a run has, and in which order they are called."""

from __future__ import annotations

import torch.distributed as dist

from megatron_bagel.config.parser import Config
from megatron_bagel.training.hooks import Hooks, StepHook
from megatron_bagel.training.observability.profiling import ProfilerWindow
from megatron_bagel.training.resilience.garbage_collection import GarbageCollection
from megatron_bagel.training.resilience.run_monitors import Survival
from megatron_bagel.training.saving import Saving


def build_hooks(config: Config, survival: Survival, saving: Saving) -> Hooks:
    """The hooks of a run by its flags.

    The profiler comes first, so that a trace holds what the others do. Garbage is collected last, outside of the times that the monitors
    measure, and after a rank has said that its step is over.
    """
    hooks: list[StepHook] = [ProfilerWindow(config.observing, config.training.results_dir, dist.get_rank())]
    hooks += survival.hooks(lambda: saving.saver.last_seconds)
    if config.megatron.manual_gc:
        hooks.append(GarbageCollection(config.megatron.manual_gc_interval))
    return Hooks(hooks)
