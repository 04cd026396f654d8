# SPDX-License-Identifier: Apache-2.0
"""Predicts step time and MFU from work and traffic, on stated assumptions. It ranks plans better than it predicts times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.costs.flops import StepWork, WorkFlops, decoder_multiplications, mfu_flops, mlp_multiplications, utilization, work_flops
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import chunk_layers, stage_layers
from megatron_bagel.planning.activations import Recompute
from megatron_bagel.planning.communication import Collective
from megatron_bagel.planning.gpus import Assumptions, Gpu


@dataclass(frozen=True)
class StepEstimate:
    """The seconds of a step by part, and the rates. ``bubble`` is a share of the pipeline's time; the MFUs are those that training logs."""

    encode_s: float
    compute_s: float
    tensor_s: float
    context_s: float
    expert_s: float
    pipeline_s: float
    bubble_s: float
    data_s: float
    bubble: float
    step_time_s: float
    tokens_per_s: float
    mfu: float
    work_mfu: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields for JSON."""
        return asdict(self)


def recomputed_flops(inputs: CostInputs, work: StepWork, recompute: Recompute) -> float:
    """Return the operations of passes that are done a second time. A layer's forward pass is a third of its work."""
    arch, megatron = inputs.arch, inputs.megatron
    flops, llm = work_flops(arch, work), arch.llm
    forward, attention = flops.decoder_linear / 3, flops.decoder_attention / 3
    extra = 0.0
    if "core_attn" in recompute.modules:
        extra += attention
    if "mlp" in recompute.modules:
        extra += 2.0 * mlp_multiplications(llm, work)
    if recompute.granularity == "full":
        stages, chunks = stage_layers(megatron, llm.num_hidden_layers), virtual_stages(megatron, llm.num_hidden_layers) or 1
        recomputed_layers = sum(chunks * (layers // chunks - recompute.saving_layers(layers // chunks)) for layers in stages)
        extra += (forward + attention) * recomputed_layers / llm.num_hidden_layers
    if megatron.ce_chunk_tokens:
        extra += 2.0 * llm.vocab_size * llm.hidden_size * work.ce_tokens
    return extra + recomputed_vit_flops(inputs, flops)


def recomputed_vit_flops(inputs: CostInputs, flops: WorkFlops) -> float:
    """Return the operations of the vision tower's forward pass that are done again: for recomputation, and for constant encoder memory."""
    megatron = inputs.megatron
    again = megatron.encoder_memory == "constant" and not inputs.frozen.und
    return flops.vit / 3 * (megatron.recompute_vit + again)


class StepTime:
    """Computes the times of a run on a GPU by the formulas in ``docs/planning.md``."""

    def __init__(self, inputs: CostInputs, gpu: Gpu, assumptions: Assumptions) -> None:
        self.inputs, self.arch, self.megatron, self.sizes = inputs, inputs.arch, inputs.megatron, inputs.sizes
        self.gpu, self.assumptions = gpu, assumptions

    def estimate(self, work: StepWork, calls: Sequence[Sequence[Collective]]) -> StepEstimate:
        """Predict the time of a step.

        Args:
            work: The work of the global batch.
            calls: The collectives of a rank of each stage.
        """
        megatron, frozen, sizes = self.megatron, self.inputs.frozen, self.sizes
        flops = work_flops(self.arch, work, frozen.decoder_weights, frozen.vit_forward_only)
        compute = max(self._compute(flops, work, stage) for stage in range(len(calls)))
        tensor, context, expert, pipeline, data = (
            max(sum(self.seconds(call) for call in stage if call.axis == axis) for stage in calls)
            for axis in ("tensor", "context", "expert", "pipeline", "data")
        )
        chunks = virtual_stages(megatron, self.arch.llm.num_hidden_layers) or 1
        if chunks > 1:
            pipeline = 0.0  # interleaved stages send while they compute
        busy = compute + tensor + context + expert + pipeline
        bubbles = (megatron.pipeline_model_parallel_size - 1) / (chunks * sizes.num_microbatches)
        exposed = self._exposed(data, compute / sizes.num_microbatches)
        encode = self._encode(flops) + max(sum(self.seconds(call) for call in stage if call.axis == "encoders") for stage in calls)
        step = encode + busy * (1 + bubbles) + exposed
        rates = [
            utilization(amount, step, self.gpu.tflops, sizes.world_size)[1] for amount in (mfu_flops(self.arch.llm, work), flops.total)
        ]
        shares = busy * bubbles, exposed, bubbles / (1 + bubbles)
        return StepEstimate(encode, compute, tensor, context, expert, pipeline, *shares, step, work.tokens / step, *rates)

    def seconds(self, call: Collective) -> float:
        """Return the seconds of all calls of a collective, at the rate of the slowest link in its group."""
        gpu, assumptions = self.gpu, self.assumptions
        inside_node = call.span <= gpu.gpus_per_node
        rate = gpu.link_gbs * assumptions.link_share if inside_node else gpu.network_gbs * assumptions.network_share
        return call.sent / (rate * 1e9)

    def _compute(self, flops: WorkFlops, work: StepWork, stage: int) -> float:
        """Return the seconds of computation of a rank of ``stage``: decoder layers, heads on the last stage, recomputation."""
        layers, peak = stage_layers(self.megatron, self.arch.llm.num_hidden_layers), self.gpu.tflops * 1e12
        share = layers[stage] / sum(layers)
        recomputed = recomputed_flops(self.inputs, work, Recompute.of(self.megatron)) - recomputed_vit_flops(self.inputs, flops)
        stage_layer_numbers = [layer for chunk in chunk_layers(self.megatron, self.arch.llm.num_hidden_layers, stage) for layer in chunk]
        multiplications = decoder_multiplications(self.arch.llm, work, stage_layer_numbers)
        linear_share = multiplications / decoder_multiplications(self.arch.llm, work)
        linear = flops.decoder_linear * linear_share + (flops.heads if stage == len(layers) - 1 else 0)
        per_stage = self.sizes.world_size / len(layers)
        assumptions = self.assumptions
        decoder = flops.decoder_linear + flops.decoder_attention
        mean_rate = decoder / (flops.decoder_linear / assumptions.matmul_share + flops.decoder_attention / assumptions.attention_share)
        seconds = (
            linear / assumptions.matmul_share
            + flops.decoder_attention * share / assumptions.attention_share
            + recomputed * share / mean_rate
        )
        return seconds / peak / per_stage

    def _encode(self, flops: WorkFlops) -> float:
        """Return the seconds of ViT and autoencoder, shared by a replica's ranks or spent by each rank of the first stage."""
        work = flops.vit + recomputed_vit_flops(self.inputs, flops) + flops.autoencoder
        ranks = self.sizes.world_size if encoders_on_all_ranks(self.megatron) else self.sizes.data_parallel_size
        return work / ranks / (self.gpu.tflops * 1e12 * self.assumptions.encoder_share)

    def _exposed(self, data: float, microbatch: float) -> float:
        """Return the seconds of gradient and weight traffic that are not hidden. With overlap the passes of one microbatch hide it."""
        return max(0.0, data - microbatch) if self.megatron.overlap_grad_reduce else data
