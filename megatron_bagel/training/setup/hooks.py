# SPDX-License-Identifier: Apache-2.0
"""Builds the hooks of a run, in the order in which the loop calls them."""

from __future__ import annotations

import torch.distributed as dist

from megatron_bagel.training.hooks import Hooks, StepHook
from megatron_bagel.training.observability.profiling import ProfilerWindow
from megatron_bagel.training.resilience.garbage_collection import GarbageCollection
from megatron_bagel.training.resilience.run_monitors import Survival
from megatron_bagel.training.resilience.run_warnings import RunWarnings, WarningSettings
from megatron_bagel.training.resilience.unseen_rows import NewRows, UnseenRows
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.saving import Saving


def build_hooks(resolved: ResolvedRun, survival: Survival, saving: Saving) -> Hooks:
    """Return the hooks of a run.

    The profiler comes first, so that a trace contains the other hooks. Garbage collection comes last: outside of the times that the
    monitors measure, and after a rank has reported the end of its step.
    """
    hooks: list[StepHook] = [ProfilerWindow(resolved.observing, resolved.results_dir, dist.get_rank())]
    hooks += survival.hooks(lambda: saving.saver.last_seconds)
    hooks.append(RunWarnings(warning_settings(resolved), survival.events))
    if resolved.new_tokens:
        rows = NewRows(resolved.new_tokens, resolved.results_dir, resolved.loop.total_steps)
        hooks.append(UnseenRows(rows, survival.events))
    if resolved.megatron.manual_gc:
        hooks.append(GarbageCollection(resolved.megatron.manual_gc_interval))
    return Hooks(hooks)


def warning_settings(resolved: ResolvedRun) -> WarningSettings:
    """Return what the warnings of a run depend on. Rates are those of the guide's fine-tuning (2e-5) and usual for LoRA, with room."""
    fine_tunes, frozen = resolved.start.resume_from is not None and resolved.start.model_only, resolved.build.frozen
    return WarningSettings(
        results_dir=resolved.results_dir,
        total_steps=resolved.loop.total_steps,
        lr=resolved.schedule.lr,
        safe_lr=None if not fine_tunes else 1e-4 if frozen.lora is None else 1e-3,
        ema_decay=resolved.ema_decay,
        ema_warmup=resolved.ema_warmup,
        expects_gen=resolved.arch.autoencoder is not None,
        expects_und=not frozen.und,
    )
