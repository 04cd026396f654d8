# SPDX-License-Identifier: Apache-2.0
"""Chooses between the two ways of the vision tower through a step: the activations of all its images, or of one chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.planning.gpus import Assumptions
from megatron_bagel.planning.memory import PeakMemory
from megatron_bagel.planning.rank_tokens import RankTokens, rank_tokens
from megatron_bagel.planning.workload import Mix, typical_pack

GIB = 2**30


def with_encoder_memory(inputs: CostInputs, packs: Sequence[RankTokens], memory_bytes: float) -> CostInputs:
    """Return the inputs with ``encoder_memory`` auto decided.

    Args:
        inputs: The settings of the run.
        packs: The packs of a replica's step.
        memory_bytes: The memory that a step may use. auto is constant if the peak with step exceeds it.
    """
    megatron = inputs.megatron
    if megatron.encoder_memory != "auto":
        return inputs
    by_step = replace(inputs, megatron=replace(megatron, encoder_memory="step"))
    if max(stage.peak for stage in PeakMemory(by_step).stages(packs)) <= memory_bytes:
        return by_step
    return replace(inputs, megatron=replace(megatron, encoder_memory="constant"))


def encoder_memory_of_a_run(inputs: CostInputs, device_bytes: int | None) -> MegatronArguments:
    """Return the settings of a run with ``encoder_memory`` auto decided, for typical packs as a plan assumes them.

    A run cannot know the packs that are to come. Where the formulas do not apply (no GPU, the reference attention, packs that are
    smaller than a typical sample), auto is step.

    Args:
        inputs: The settings of the run.
        device_bytes: The memory of a GPU, or None on a CPU.
    """
    step = replace(inputs.megatron, encoder_memory="step")
    if inputs.megatron.encoder_memory != "auto":
        return inputs.megatron
    if device_bytes is None or inputs.arch.vit is None or inputs.sizes.attention_backend == "dense":
        return step
    tokens = _typical_tokens(inputs.arch, inputs.megatron, inputs.capacity)
    if tokens is None:
        return step
    usable_bytes = device_bytes - Assumptions().reserved_gib * GIB
    return with_encoder_memory(inputs, [tokens] * inputs.sizes.num_microbatches, usable_bytes).megatron


def _typical_tokens(arch: BagelArch, megatron: MegatronArguments, capacity: int) -> RankTokens | None:
    """Return the sizes of a typical pack on a rank, or None if packs are smaller than a typical sample."""
    try:
        pack = typical_pack(arch, Mix.of(PlanArguments()), capacity)
    except ValueError:
        return None
    multiple = megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1
    fixed = capacity if megatron.pipeline_model_parallel_size > 1 else None
    return rank_tokens(pack, 0, megatron.context_parallel_size, fixed, multiple, megatron.cp_comm_type == "a2a")
