"""A rehearsal of one rank of a run of any size: its modules, buffers, optimizer, packs, layout and checkpoint, without memory or ranks.

Everything is made by the functions of a real run (training/setup/set_up.py, training/setup/build.py, data/loading/loader.py,
checkpoint/dist/state.py); only tensors lie on the meta device and the process group is fake. What a step would issue and hold is then
counted from the packs planned.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_bagel.assembly.meta_init import on_meta
from megatron_bagel.checkpoint.dist.state import Trained, sharded_state, sharded_tensors
from megatron_bagel.config.resolve import ResolvedSizes
from megatron_bagel.data.index.format import MANIFEST
from megatron_bagel.data.loading.build import open_loader
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.layout.pack import Pack
from megatron_bagel.parallel.rank_coordinates import RankCoordinates, check_rank_order, coordinates_of
from megatron_bagel.planning.communication import Collective, CommunicationModel
from megatron_bagel.planning.memory import PeakMemory, StageMemory
from megatron_bagel.planning.rank_tokens import RankTokens, rank_tokens
from megatron_bagel.planning.report import GIB, table
from megatron_bagel.platform.device import peak_memory_bytes
from megatron_bagel.platform.launch.fake_world import MetaCountsAsCuda, fake_world
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.setup import set_up as setup
from megatron_bagel.training.setup.build import build_trainable
from megatron_bagel.training.step import Trainable


@dataclass
class DryRunReport:
    """What one rank of a run would hold and do; ``seconds`` of each phase. ``checkpoint`` are tensors and bytes by section."""

    sizes: ResolvedSizes
    rank: int
    place: RankCoordinates
    plans: list[PackPlan]
    packs: list[Pack]
    tokens: list[RankTokens]
    built: dict[str, int]
    memory: StageMemory
    calls: list[Collective]
    checkpoint: dict[str, tuple[int, int]]
    seconds: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """For a reader."""
        place, sizes = self.place, self.sizes
        head = (
            f"rank {self.rank} of {sizes.world_size}: tensor {place.tensor}, context {place.context}, data {place.data}, pipeline "
            f"{place.pipeline}; {sizes.global_batch_size} packs per step, {sizes.num_microbatches} of them on this replica"
        )
        held = self.memory.held
        memory = [["GiB", "formula", "built"]]
        for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes", "average_bytes", "autoencoder_bytes"):
            memory.append([name.removesuffix("_bytes"), f"{getattr(held, name) / GIB:.3f}", f"{self.built[name] / GIB:.3f}"])
        memory += [["activations", f"{self.memory.activations / GIB:.3f}", ""], ["buffers", f"{self.memory.buffers / GIB:.3f}", ""]]
        memory += [["peak of a step", f"{self.memory.peak / GIB:.3f}", ""]]
        packs = [["pack", "samples", "tokens", "text", "ViT", "VAE", "on this rank"]]
        for plan, pack, tokens in zip(self.plans, self.packs, self.tokens, strict=True):
            kinds = (pack.text_positions, pack.vit_positions, pack.vae_positions)
            numbers = (plan.number, len(plan.samples), plan.tokens, *map(len, kinds), tokens.real)
            packs.append([str(number) for number in numbers])
        calls = [["axis", "what", "kind", "ranks", "bytes", "calls per step"]]
        calls += [[call.axis, call.what, call.kind, str(call.ranks), f"{call.size:,}", str(call.count)] for call in self.calls]
        stored = [["checkpoint, this rank's share", "tensors", "GiB"]]
        stored += [[name, str(count), f"{size / GIB:.3f}"] for name, (count, size) in self.checkpoint.items()]
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return "\n\n".join([
            head, table(memory), table(packs[:9]) + (f"\n... {len(packs) - 9} more" if len(packs) > 9 else ""), table(calls), table(stored),
            f"seconds: {spent}\n{usage()}",
        ])  # fmt: skip


def usage() -> str:
    """What this process has used so far, as /usr/bin/time tells it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return f"process: user {used.ru_utime:.1f} s, system {used.ru_stime:.1f} s, largest resident memory {peak_memory_bytes() / GIB:.2f} GiB"


def dry_run(resolved: ResolvedRun, rank: int) -> DryRunReport:
    """Rehearse ``rank`` of a run, which was resolved for GPUs.

    Raises ValueError for a rank outside of the world, an index that is not built yet (a rehearsal writes nothing), and like a run's start.
    """
    sizes, megatron, settings = resolved.sizes, resolved.megatron, resolved.step
    if not 0 <= rank < sizes.world_size:
        raise ValueError(f"--fake_rank {rank} is not a rank of --fake_world_size {sizes.world_size}")
    if not (resolved.data.index / MANIFEST).is_file():
        raise ValueError(f"there is no index in {resolved.data.index}: build one with data_tools/build_index.py and give --index_dir")
    seconds: dict[str, float] = {}
    with fake_world(rank, sizes.world_size):
        with _timed(seconds, "groups"):
            setup.initialize_parallel(resolved)
            check_rank_order()
            place = coordinates_of(dist.get_rank())
            replica, share = setup.encoding_share(resolved)
        with _timed(seconds, "packs"):
            loader = open_loader(
                resolved.data, resolved.arch, resolved.tokenizer, sizes.batch_sizes, place.data, sizes.data_parallel_size, share
            )
            plans = loader.plan_next()
            packs = [loader.reader.layout(plan) for plan in plans]
            tokens = [
                rank_tokens(
                    pack, place.context, megatron.context_parallel_size,
                    settings.seq_length if settings.fixed_slots else None, settings.slot_multiple, settings.cp_comm_type == "a2a",
                )
                for pack in packs
            ]  # fmt: skip
        with _timed(seconds, "model and optimizer"), on_meta(), MetaCountsAsCuda():
            trainable, trained = build_trainable(resolved, None, replica, share)
            built = built_bytes(trainable, trained)
        with _timed(seconds, "checkpoint"), on_meta(), MetaCountsAsCuda(everywhere=True):
            checkpoint = checkpoint_share(trained)
        with _timed(seconds, "memory and collectives"):
            memory = PeakMemory(resolved.costs).stage(place.pipeline, tokens)
            calls = CommunicationModel(resolved.costs).rank(place.pipeline, tokens)
    return DryRunReport(sizes, rank, place, plans, packs, tokens, built, memory, calls, checkpoint, seconds)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def built_bytes(trainable: Trainable, trained: Trained) -> dict[str, int]:
    """What the modules, buffers and optimizers that were built would hold, in the memory model's terms.

    Optimizer state is made at the first step: two moments of each main weight, and that weight where it is not the model's own.
    """
    parameters = [parameter for part in trained.modules.values() for parameter in part.parameters()]
    buffers = [buffer for part in trainable.wrapped for buffer in part.buffers]
    inside = {id(parameter) for buffer in buffers for parameter in buffer.params}
    weights = sum(parameter.nbytes for parameter in parameters if id(parameter) not in inside)
    for buffer in buffers:
        sharded = buffer.param_data is not None
        weights += buffer.param_data.nbytes if sharded else sum(parameter.nbytes for parameter in buffer.params)
    own = {id(parameter) for parameter in parameters}
    mains = _main_weights(trainable)
    apart = any(parameter.dtype != torch.float32 for parameter in parameters)
    autoencoder = trainable.image_encoder.autoencoder
    return {
        "weight_bytes": weights,
        "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer_bytes": sum((3 if apart and id(main) not in own else 2) * 4 * main.numel() for main in mains),
        "average_bytes": trainable.ema.local_bytes() if trainable.ema is not None else 0,
        "autoencoder_bytes": sum(weight.nbytes for weight in autoencoder.parameters()) if autoencoder is not None else 0,
    }


def _main_weights(trainable: Trainable) -> list[torch.Tensor]:
    leaves = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    real = [leaf.optimizer for leaf in leaves if not getattr(leaf, "is_stub_optimizer", False)]
    return [main for optimizer in real for group in optimizer.param_groups for main in group["params"]]


def checkpoint_share(trained: Trained) -> dict[str, tuple[int, int]]:
    """Tensors, and bytes of their local shards, that the rank names in a checkpoint, by section."""
    shares = {}
    for name, section in sharded_state(trained, is_loading=True).items():
        shards: list[ShardedTensor] = list(sharded_tensors(section))
        shares[name] = (len(shards), sum(_bytes(shard) for shard in shards))
    return shares


def _bytes(shard: ShardedTensor) -> int:
    elements = 1
    for size in shard.local_shape:
        elements *= size
    return elements * torch.empty(0, dtype=shard.dtype, device="meta").element_size()
