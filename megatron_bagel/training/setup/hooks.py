# SPDX-License-Identifier: Apache-2.0
"""Builds the hooks of a run, in the order in which the loop calls them."""

from __future__ import annotations

import torch.distributed as dist

from megatron_bagel.training.hooks import Hooks, StepHook
from megatron_bagel.training.observability.profiling import ProfilerWindow
from megatron_bagel.training.resilience.garbage_collection import GarbageCollection
from megatron_bagel.training.resilience.run_monitors import Survival
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.saving import Saving


def build_hooks(resolved: ResolvedRun, survival: Survival, saving: Saving) -> Hooks:
    """Return the hooks of a run.

    The profiler comes first, so that a trace contains the other hooks. Garbage collection comes last: outside of the times that the
    monitors measure, and after a rank has reported the end of its step.
    """
    hooks: list[StepHook] = [ProfilerWindow(resolved.observing, resolved.results_dir, dist.get_rank())]
    hooks += survival.hooks(lambda: saving.saver.last_seconds)
    if resolved.megatron.manual_gc:
        hooks.append(GarbageCollection(resolved.megatron.manual_gc_interval))
    return Hooks(hooks)
