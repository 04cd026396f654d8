# SPDX-License-Identifier: Apache-2.0
"""A measured step beside the formulas of ``megatron_bagel plan``: memory, seconds, and the shares of the peak that the plan assumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.step import StepOptions
from megatron_bagel import platform
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.resolve import ResolvedSizes
from megatron_bagel.costs.flops import StepWork, peak_tflops, work_flops
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.layout.pack import Pack
from megatron_bagel.planning.estimate import StepTime
from megatron_bagel.planning.gpus import GPUS, Assumptions, Gpu
from megatron_bagel.planning.memory import PeakMemory
from megatron_bagel.planning.rank_tokens import rank_tokens
from megatron_bagel.platform.device import device_name


def cost_inputs(arch: BagelArch, backend: str, options: StepOptions, capacity: int) -> CostInputs:
    """The settings of a measured step, as a plan of one GPU has them."""
    megatron = MegatronArguments(
        transformer_impl="local",
        recompute_granularity="full" if options.recompute_layers else None,
        recompute_method="block",
        recompute_num_layers=max(1, options.recompute_layers),
        recompute_vit=options.recompute_layers > 0,
        encoder_memory="step" if options.vit_chunk_tokens is None else "constant",
        encoder_chunk_tokens=options.vit_chunk_tokens or 1,
        ce_chunk_tokens=options.ce_chunk_tokens,
        overlap_vae_encode=options.overlap_vae,
    )
    sizes = ResolvedSizes(1, 1, 1, 1, BatchSizes.of(1, []), backend, platform.has_gpu(), True, 1, False)
    return CostInputs(arch, megatron, sizes, capacity)


def predictions(arch: BagelArch, pack: Pack, backend: str, options: StepOptions, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Memory beside the formula, and on a known GPU the predicted seconds and the shares of the peak that were reached."""
    inputs = cost_inputs(arch, backend, options, pack.sequence_length)
    stage = PeakMemory(inputs).stage(0, [rank_tokens(pack, 0, 1, None, 1, False)])
    memory = {"formula_bytes": stage.peak, "measured_bytes": figures["peak_mem_bytes"], **stage.to_dict()}
    gpu = _gpu()
    if gpu is None:
        return {"memory": memory}
    work = StepWork.of(pack)
    estimate = StepTime(inputs, gpu, Assumptions()).estimate(work, [[]])
    flops, parts, peak = work_flops(arch, work), figures["parts_s"], gpu.tflops * 1e12
    vit_s, decoder_s = parts["vit_forward"], parts["decoder_forward"] + parts["backward"]
    shares = {
        # A forward pass is a third of the ViT's work; its backward pass is measured with the decoder's.
        "vit": flops.vit / 3 / vit_s / peak,
        "decoder": (flops.decoder_linear + flops.decoder_attention + flops.heads + flops.vit * 2 / 3) / decoder_s / peak,
        "whole_step": flops.total / figures["step_s"] / peak,
    }
    if not options.stored_latents and not options.overlap_vae:  # no part of the step is the autoencoder's alone then
        shares["autoencoder"] = flops.autoencoder / parts["autoencoder"] / peak
    predicted = {"step_s": estimate.step_time_s, "encode_s": estimate.encode_s, "compute_s": estimate.compute_s}
    return {"memory": memory, "predicted": predicted, "shares_of_peak": shares}


def _gpu() -> Gpu | None:
    """This machine's GPU in the plan's table, or None."""
    if not platform.has_gpu() or not peak_tflops(device_name()):
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name.lower() in device_name().lower()), None)
