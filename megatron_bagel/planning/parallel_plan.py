# SPDX-License-Identifier: Apache-2.0
"""Plans one model on some GPUs with one choice of parallel sizes: memory, work, traffic and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.resolve import ResolvedSizes
from megatron_bagel.costs.flops import StepWork, WorkFlops, work_flops
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import MemoryModel
from megatron_bagel.layout.pack import Pack
from megatron_bagel.planning.activations import Recompute
from megatron_bagel.planning.communication import Collective, CommunicationModel, sent_by_axis
from megatron_bagel.planning.encoder_memory import with_encoder_memory
from megatron_bagel.planning.estimate import StepEstimate, StepTime, recomputed_flops
from megatron_bagel.planning.gpus import Assumptions, Gpu
from megatron_bagel.planning.memory import PeakMemory, StageMemory
from megatron_bagel.planning.models import active_parameters, parameters
from megatron_bagel.planning.rank_tokens import RankTokens, rank_tokens

GIB = 2**30
TokensOf = Callable[[int, int | None, int, bool], RankTokens]


@dataclass(frozen=True)
class Problem:
    """What is the same for all plans of a search: model, machine, assumptions, and the pack that every microbatch equals."""

    arch: BagelArch
    gpu: Gpu
    gpus: int
    assumptions: Assumptions
    pack: Pack

    @property
    def memory_bytes(self) -> float:
        """Return the memory of a GPU that a run can use."""
        return (self.gpu.memory_gib - self.assumptions.reserved_gib) * GIB

    def tokens_of(self) -> TokensOf:
        """Return a cached function of (ranks, capacity, multiple, all-to-all) to the sizes of the pack on context-parallel rank 0."""
        return cache(lambda ranks, capacity, multiple, all_to_all: rank_tokens(self.pack, 0, ranks, capacity, multiple, all_to_all))


@dataclass(frozen=True)
class ParallelPlan:
    """The plan for one choice of parallel sizes.

    Attributes:
        inputs: The settings that the costs follow from.
        memory: The memory of a rank of each stage.
        work: The work of the global batch.
        flops: Its operations by part.
        recomputed: The operations that are done a second time.
        calls: The collectives of a rank of each stage.
        estimate: The predicted times.
        fits: Whether the memory of a GPU is sufficient.
    """

    inputs: CostInputs
    memory: list[StageMemory]
    work: StepWork
    flops: WorkFlops
    recomputed: float
    calls: list[list[Collective]]
    estimate: StepEstimate
    fits: bool

    @property
    def sizes(self) -> ResolvedSizes:
        """Return the batch sizes and the precision."""
        return self.inputs.sizes

    @property
    def parameters(self) -> dict[str, int]:
        """Return the parameters of the model, and those that serve a token of either kind in the decoder."""
        arch = self.inputs.arch
        return {"total": parameters(arch), "active_und": active_parameters(arch, "und"), "active_gen": active_parameters(arch, "gen")}

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory of the stage that needs most."""
        return max(stage.peak for stage in self.memory)

    @property
    def name(self) -> str:
        """Return the parallel sizes in short, such as "TP4+SP PP2x2 CP1 DP8, recompute none". EP follows if experts are divided."""
        megatron = self.inputs.megatron
        chunks = megatron.virtual_pipeline_model_parallel_size
        tensor = f"TP{megatron.tensor_model_parallel_size}{'+SP' if megatron.sequence_parallel else ''}"
        pipeline = f"PP{megatron.pipeline_model_parallel_size}{f'x{chunks}' if chunks else ''}"
        recompute: str = megatron.recompute_granularity or "none"
        if recompute == "full":
            recompute = f"{megatron.recompute_method} {megatron.recompute_num_layers}"
        elif recompute == "selective":
            recompute = " and ".join(megatron.recompute_modules or ["core_attn"])
        experts = ""
        if megatron.expert_model_parallel_size > 1:
            experts = f" EP{megatron.expert_model_parallel_size}"
            expert_tensor = megatron.expert_tensor_size(megatron.tensor_model_parallel_size)
            experts += f" ETP{expert_tensor}" if expert_tensor > 1 else ""
        return f"{tensor} {pipeline} CP{megatron.context_parallel_size} DP{self.sizes.data_parallel_size}{experts}, recompute {recompute}"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        megatron = self.inputs.megatron
        return {
            "name": self.name,
            "layout": {
                "tensor": megatron.tensor_model_parallel_size, "sequence_parallel": megatron.sequence_parallel,
                "pipeline": megatron.pipeline_model_parallel_size, "virtual": megatron.virtual_pipeline_model_parallel_size,
                "context": megatron.context_parallel_size, "data": self.sizes.data_parallel_size,
                "expert": megatron.expert_model_parallel_size,
                "expert_tensor": megatron.expert_tensor_size(megatron.tensor_model_parallel_size),
                "global_batch_size": self.sizes.global_batch_size, "packs_per_replica": self.sizes.num_microbatches,
                "encoder_memory": megatron.encoder_memory,
            },
            "parameters": self.parameters,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "stages": [stage.to_dict() for stage in self.memory],
            "flops": {**asdict(self.flops), "total": self.flops.total, "recomputed": self.recomputed},
            "communication_bytes": [sent_by_axis(calls) for calls in self.calls],
            "estimate": self.estimate.to_dict(),
        }  # fmt: skip


def make_plan(inputs: CostInputs, problem: Problem, tokens_of: TokensOf | None = None) -> ParallelPlan:
    """Plan a run.

    Args:
        inputs: The settings of the run, which have been checked.
        problem: The model, machine and pack.
        tokens_of: The function of ``problem.tokens_of()``, for a search that makes many plans.

    Raises:
        ValueError: The settings cannot be planned.
    """
    megatron, sizes = inputs.megatron, inputs.sizes
    tokens = (tokens_of or problem.tokens_of())(
        megatron.context_parallel_size,
        inputs.capacity if megatron.pipeline_model_parallel_size > 1 else None,
        megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1,
        megatron.cp_comm_type == "a2a",
    )
    packs = [tokens] * sizes.num_microbatches
    inputs = with_encoder_memory(inputs, packs, problem.memory_bytes)
    memory_model = MemoryModel(inputs)
    memory = PeakMemory(inputs, memory_model).stages(packs)
    traffic = CommunicationModel(inputs, memory_model)
    calls = [traffic.rank(stage, packs) for stage in range(megatron.pipeline_model_parallel_size)]
    pack_work = StepWork.of(problem.pack)
    work = StepWork(*(value * sizes.global_batch_size for value in pack_work.__dict__.values()))
    return ParallelPlan(
        inputs=inputs,
        memory=memory,
        work=work,
        flops=work_flops(inputs.arch, work, inputs.frozen.decoder_weights, inputs.frozen.vit_forward_only),
        recomputed=recomputed_flops(inputs, work, Recompute.of(megatron)),
        calls=calls,
        estimate=StepTime(inputs, problem.gpu, problem.assumptions).estimate(work, calls),
        fits=max(stage.peak for stage in memory) <= problem.memory_bytes,
    )
