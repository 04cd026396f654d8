# SPDX-License-Identifier: Apache-2.0
"""Builds one rank of a run of any size without memory or other ranks: its modules, buffers, optimizer, packs and checkpoint.

The functions of a real run build everything (``training/setup/set_up.py``, ``training/setup/build.py``, ``data/loading/loader.py``,
``checkpoint/dist/state.py``), but tensors are on the meta device and the process group is fake. The collectives and the memory of a step
are then counted from the planned packs.
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
from megatron_bagel.training.optim.one_pass import OnePassAdamW
from megatron_bagel.training.optim.optimizer import gradient_buffers, leaf_optimizers
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.setup import set_up as setup
from megatron_bagel.training.setup.build import build_trainable
from megatron_bagel.training.step import Trainable


@dataclass
class DryRunReport:
    """What one rank of a run would have in memory and do.

    Attributes:
        sizes: The batch sizes, replicas and types of the run.
        rank: The number of the rank.
        coordinates: Its rank on each parallel axis.
        plans: The planned packs of its replica's first step.
        packs: The layouts of these packs.
        tokens: The sizes of these packs on the rank.
        built: The bytes of what was built, by kind.
        memory: The bytes by formula.
        calls: The collectives of a step.
        checkpoint: The number of tensors and their bytes in the rank's share of a checkpoint, by section.
        seconds: The duration of each phase of the dry run.
    """

    sizes: ResolvedSizes
    rank: int
    coordinates: RankCoordinates
    plans: list[PackPlan]
    packs: list[Pack]
    tokens: list[RankTokens]
    built: dict[str, int]
    memory: StageMemory
    calls: list[Collective]
    checkpoint: dict[str, tuple[int, int]]
    seconds: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """Return the report as text."""
        coordinates, sizes = self.coordinates, self.sizes
        head = (
            f"rank {self.rank} of {sizes.world_size}: tensor {coordinates.tensor}, context {coordinates.context}, "
            f"data {coordinates.data}, pipeline {coordinates.pipeline}; "
            f"{sizes.global_batch_size} packs per step, {sizes.num_microbatches} of them on this replica"
        )
        calls = [["axis", "payload", "kind", "ranks", "bytes", "calls per step"]]
        calls += [[call.axis, call.payload, call.kind, str(call.ranks), f"{call.size:,}", str(call.count)] for call in self.calls]
        checkpoint = [["checkpoint, this rank's share", "tensors", "GiB"]]
        checkpoint += [[name, str(count), f"{size / GIB:.3f}"] for name, (count, size) in self.checkpoint.items()]
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return "\n\n".join([
            head, self._memory_table(), self._pack_table(), table(calls), table(checkpoint), f"seconds: {phases}\n{usage()}",
        ])  # fmt: skip

    def _memory_table(self) -> str:
        memory = [["GiB", "formula", "built"]]
        for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes", "average_bytes", "autoencoder_bytes"):
            formula, built = getattr(self.memory.static, name), self.built[name]
            memory.append([name.removesuffix("_bytes"), f"{formula / GIB:.3f}", f"{built / GIB:.3f}"])
        memory += [["activations", f"{self.memory.activations / GIB:.3f}", ""], ["buffers", f"{self.memory.buffers / GIB:.3f}", ""]]
        memory += [["peak of a step", f"{self.memory.peak / GIB:.3f}", ""]]
        return table(memory)

    def _pack_table(self) -> str:
        packs = [["pack", "samples", "tokens", "text", "ViT", "VAE", "on this rank"]]
        for plan, pack, tokens in zip(self.plans, self.packs, self.tokens, strict=True):
            kinds = (pack.text_positions, pack.vit_positions, pack.vae_positions)
            numbers = (plan.number, len(plan.samples), plan.tokens, *map(len, kinds), tokens.num_tokens)
            packs.append([str(number) for number in numbers])
        return table(packs[:9]) + (f"\n... {len(packs) - 9} more" if len(packs) > 9 else "")


def usage() -> str:
    """Return the time and memory that this process has used so far, as ``/usr/bin/time`` reports them."""
    resources = resource.getrusage(resource.RUSAGE_SELF)
    return (
        f"process: user {resources.ru_utime:.1f} s, system {resources.ru_stime:.1f} s, "
        f"largest resident memory {peak_memory_bytes() / GIB:.2f} GiB"
    )


def dry_run(resolved: ResolvedRun, rank: int) -> DryRunReport:
    """Build ``rank`` of a run that was resolved for GPUs, and return what it would have and do.

    Raises:
        ValueError: The rank is outside of the world, the index is not built yet (a dry run writes nothing), or a run could not start.
    """
    sizes, megatron, settings = resolved.sizes, resolved.megatron, resolved.step
    if not 0 <= rank < sizes.world_size:
        raise ValueError(f"--fake_rank {rank} is not a rank of --fake_world_size {sizes.world_size}")
    if resolved.data.index_cache is not None:
        raise ValueError(
            f"--index_dir {resolved.data.index_cache.url}: a dry run fetches nothing; give it a copy of the index on this machine"
        )
    if not (resolved.data.index / MANIFEST).is_file():
        raise ValueError(f"there is no index in {resolved.data.index}: build one with data_tools/build_index.py and pass --index_dir")
    seconds: dict[str, float] = {}
    with fake_world(rank, sizes.world_size):
        with _timed(seconds, "groups"):
            setup.initialize_parallel(resolved)
            check_rank_order()
            coordinates = coordinates_of(dist.get_rank())
            replica, share = setup.encoding_share(resolved)
        with _timed(seconds, "packs"):
            loader = open_loader(
                resolved.data, resolved.arch, resolved.tokenizer, sizes.batch_sizes, coordinates.data, sizes.data_parallel_size, share
            )
            plans = loader.plan_next()
            packs = [loader.reader.layout(plan) for plan in plans]
            tokens = [
                rank_tokens(
                    pack, coordinates.context, megatron.context_parallel_size,
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
            memory = PeakMemory(resolved.costs).stage(coordinates.pipeline, tokens)
            calls = CommunicationModel(resolved.costs).rank(coordinates.pipeline, tokens)
    return DryRunReport(sizes, rank, coordinates, plans, packs, tokens, built, memory, calls, checkpoint, seconds)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the duration of the block to ``seconds``."""
    start_time = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start_time


def built_bytes(trainable: Trainable, trained: Trained) -> dict[str, int]:
    """Return the bytes of the modules, buffers and optimizers that were built, in the memory model's terms.

    The first step makes the optimizer's state: two moments of each main weight, and the weight itself if it is not the model's.
    """
    parameters = [parameter for part in trained.modules.values() for parameter in part.parameters()]
    buffers = [buffer for part in trainable.wrapped for buffer in gradient_buffers(part)]
    buffered = {id(parameter) for buffer in buffers for parameter in buffer.params}
    weights = sum(parameter.nbytes for parameter in parameters if id(parameter) not in buffered)
    for buffer in buffers:
        sharded = buffer.param_data is not None
        weights += buffer.param_data.nbytes if sharded else sum(parameter.nbytes for parameter in buffer.params)
    parameter_ids = {id(parameter) for parameter in parameters}
    mains = _main_weights(trainable)
    moment_bytes = _moment_bytes(trainable)
    has_main_weights = any(parameter.dtype != torch.float32 for parameter in parameters)
    autoencoder = trainable.image_encoder.autoencoder
    return {
        "weight_bytes": weights,
        "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer_bytes": sum(
            (2 * moment_bytes + (4 if has_main_weights and id(main) not in parameter_ids else 0)) * main.numel() for main in mains
        ),
        "average_bytes": trainable.ema.local_bytes() if trainable.ema is not None else 0,
        "autoencoder_bytes": sum(weight.nbytes for weight in autoencoder.parameters()) if autoencoder is not None else 0,
    }


def _moment_bytes(trainable: Trainable) -> int:
    """Return the bytes of a number of the optimizers' moments."""
    types = [leaf.optimizer.state_dtype for leaf in leaf_optimizers(trainable.optimizer) if isinstance(leaf.optimizer, OnePassAdamW)]
    return types[0].itemsize if types else 4


def _main_weights(trainable: Trainable) -> list[torch.Tensor]:
    """Return the fp32 weights that this rank's optimizers update."""
    leaves = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    optimizers = [leaf.optimizer for leaf in leaves if not getattr(leaf, "is_stub_optimizer", False)]
    return [main for optimizer in optimizers for group in optimizer.param_groups for main in group["params"]]


def checkpoint_share(trained: Trained) -> dict[str, tuple[int, int]]:
    """Return the number of tensors in the rank's share of a checkpoint and the bytes of its shards, by section."""
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
