"""From work and traffic to a step time and an MFU, on stated assumptions: a ranking of layouts first, a prediction second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.costs.flops import StepWork, WorkFlops, layer_matrix_elements, mfu_flops, utilization, work_flops
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import stage_layers
from megatron_bagel.planning.activations import Recompute
from megatron_bagel.planning.communication import Collective
from megatron_bagel.planning.gpus import Assumptions, Gpu


@dataclass(frozen=True)
class StepEstimate:
    """Seconds of a step by part, and what follows. ``bubble`` is a share of the pipeline's time; MFUs are those of training's log."""

    encode_s: float
    compute_s: float
    tensor_s: float
    context_s: float
    pipeline_s: float
    bubble_s: float
    data_s: float
    bubble: float
    step_time_s: float
    tokens_per_s: float
    mfu: float
    work_mfu: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def recomputed_flops(inputs: CostInputs, work: StepWork, recompute: Recompute) -> float:
    """Operations of the passes that are done a second time: a layer's forward pass is a third of its work."""
    arch, megatron = inputs.arch, inputs.megatron
    flops, llm = work_flops(arch, work), arch.llm
    forward, attention = flops.decoder_linear / 3, flops.decoder_attention / 3
    extra = 0.0
    if "core_attn" in recompute.modules:
        extra += attention
    if "mlp" in recompute.modules:
        extra += forward * 3 * llm.hidden_size * llm.intermediate_size / layer_matrix_elements(llm)
    if recompute.granularity == "full":
        stages, chunks = stage_layers(megatron, llm.num_hidden_layers), virtual_stages(megatron, llm.num_hidden_layers) or 1
        again = sum(chunks * (layers // chunks - recompute.untouched(layers // chunks)) for layers in stages)
        extra += (forward + attention) * again / llm.num_hidden_layers
    if megatron.recompute_vit:
        extra += flops.vit / 3
    return extra


class StepTime:
    """Times of a layout on a GPU; the formulas are those of docs/planning.md."""

    def __init__(self, inputs: CostInputs, gpu: Gpu, assumed: Assumptions) -> None:
        self.inputs, self.arch, self.megatron, self.sizes = inputs, inputs.arch, inputs.megatron, inputs.sizes
        self.gpu, self.assumed = gpu, assumed

    def estimate(self, work: StepWork, calls: Sequence[Sequence[Collective]]) -> StepEstimate:
        """``work`` is that of the global batch; ``calls`` are the collectives of a rank of each stage."""
        megatron, frozen, sizes = self.megatron, self.inputs.frozen, self.sizes
        flops = work_flops(self.arch, work, frozen.llm, frozen.vit)
        compute = max(self._compute(flops, work, stage) for stage in range(len(calls)))
        tensor, context, pipeline, data = (
            max(sum(self.seconds(call) for call in stage if call.axis == axis) for stage in calls)
            for axis in ("tensor", "context", "pipeline", "data")
        )
        chunks = virtual_stages(megatron, self.arch.llm.num_hidden_layers) or 1
        if chunks > 1:
            pipeline = 0.0  # interleaved stages send while they compute
        busy = compute + tensor + context + pipeline
        waits = (megatron.pipeline_model_parallel_size - 1) / (chunks * sizes.num_microbatches)
        exposed = self._exposed(data, compute / sizes.num_microbatches)
        encode = self._encode(flops) + max(sum(self.seconds(call) for call in stage if call.axis == "encoders") for stage in calls)
        step = encode + busy * (1 + waits) + exposed
        rates = [
            utilization(amount, step, self.gpu.tflops, sizes.world_size)[1] for amount in (mfu_flops(self.arch.llm, work), flops.total)
        ]
        return StepEstimate(
            encode, compute, tensor, context, pipeline, busy * waits, exposed, waits / (1 + waits), step, work.tokens / step, *rates
        )

    def seconds(self, call: Collective) -> float:
        """Of all calls of a collective, at the rate of the slowest link its group spans."""
        gpu, assumed = self.gpu, self.assumed
        near = call.span <= gpu.gpus_per_node
        rate = gpu.link_gbs * assumed.link_share if near else gpu.network_gbs * assumed.network_share
        return call.sent / (rate * 1e9)

    def _compute(self, flops: WorkFlops, work: StepWork, stage: int) -> float:
        """Seconds that a rank of ``stage`` computes in a step: the decoder's layers, the heads on the last stage, recomputation."""
        layers, peak = stage_layers(self.megatron, self.arch.llm.num_hidden_layers), self.gpu.tflops * 1e12
        share = layers[stage] / sum(layers)
        again = recomputed_flops(self.inputs, work, Recompute.of(self.megatron)) - self._vit_again(flops)
        linear = flops.decoder_linear * share + (flops.heads if stage == len(layers) - 1 else 0)
        per_stage = self.sizes.world_size / len(layers)
        assumed = self.assumed
        whole = flops.decoder_linear + flops.decoder_attention
        mean_rate = whole / (flops.decoder_linear / assumed.matmul_share + flops.decoder_attention / assumed.attention_share)
        seconds = linear / assumed.matmul_share + flops.decoder_attention * share / assumed.attention_share + again * share / mean_rate
        return seconds / peak / per_stage

    def _vit_again(self, flops: WorkFlops) -> float:
        return flops.vit / 3 if self.megatron.recompute_vit else 0.0

    def _encode(self, flops: WorkFlops) -> float:
        """Seconds of ViT and autoencoder, spread over a replica's ranks or done by each rank of the first stage."""
        work = flops.vit + self._vit_again(flops) + flops.autoencoder
        ranks = self.sizes.world_size if encoders_on_all_ranks(self.megatron) else self.sizes.data_parallel_size
        return work / ranks / (self.gpu.tflops * 1e12 * self.assumed.encoder_share)

    def _exposed(self, data: float, microbatch: float) -> float:
        """Seconds of gradient and weight traffic that nothing hides: overlapped, it runs beside one microbatch's passes."""
        return max(0.0, data - microbatch) if self.megatron.overlap_grad_reduce else data
