# SPDX-License-Identifier: Apache-2.0
"""Megatron's DDP and optimizer over the decoder chunks and the vision tower, set up so that gradients are plain sums.

The optimizer is AdamW with one group and without weight decay, as in the original. The losses are already divided by their
global counts (``losses.py``), so gradients are summed over ranks and microbatches and never averaged. Frozen parameters are
in no gradient buffer and in no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_bagel import platform
from megatron_bagel.model.lora import SUMMED_OVER_TP
from megatron_bagel.platform.launch.fake_world import is_fake
from megatron_bagel.training.optim.cpu_offload import hybrid_main_weight, is_hybrid, offload_settings
from megatron_bagel.training.optim.one_pass import OnePassAdamW, StateDtype

#: The world's group and a group of this rank alone, made when it is first needed.
_single_rank: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and of its state. eps 1e-15 is the original's: almost a sign update for tiny gradients.

    ``max_grad_norm`` 0 turns clipping off; the norm is still reported. ``use_distributed_optimizer`` shards fp32 main weights and
    moments over the data-parallel ranks. ``overlap_param_gather`` needs it, and ``overlap_grad_reduce`` helps only with the streams
    of a GPU. ``distributed_optimizer_instances`` above 1 shards inside groups of ranks and replicates between them.
    ``one_pass`` updates weights and averages together (``one_pass.py``), with moments of ``state_dtype``.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    max_grad_norm: float = 1.0
    bf16: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_optimizer_instances: int = 1
    bucket_size: int | None = None
    #: Share of the parameters whose fp32 weights and moments are in host memory, and whether copies overlap with the updates there.
    offload_fraction: float = 0.0
    overlap_offload: bool = False
    one_pass: bool = False
    state_dtype: StateDtype = "fp32"

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: without sharded weights "
                "there is nothing to gather. Add both flags or remove it"
            )
        if self.one_pass and not self.use_distributed_optimizer:
            raise ValueError("--one_pass_optimizer needs --use_distributed_optimizer: it goes through the slice of weights of this rank")
        if self.one_pass and self.offload_fraction:
            raise ValueError("--one_pass_optimizer does not work with --optimizer_cpu_offload, which updates in host memory")
        if self.state_dtype != "fp32" and not self.one_pass:
            raise ValueError("--optimizer_state_dtype bf16 needs --one_pass_optimizer, the only one with moments of another type")
        if self.distributed_optimizer_instances > 1 and not self.use_distributed_optimizer:
            raise ValueError("--num-distributed-optimizer-instances above 1 needs --use-distributed-optimizer")


@dataclass(frozen=True)
class StepOutcome:
    """The result of one optimizer step. ``grad_norm`` is the global L2 norm before clipping."""

    updated: bool
    grad_norm: float


def wrap_ddp(config: TransformerConfig, modules: Sequence[torch.nn.Module], settings: OptimizerSettings) -> list[DistributedDataParallel]:
    """Wrap each module (decoder chunks in order, then the vision tower) with its own gradient buffers.

    Raises:
        ValueError: ``config.calculate_per_token_loss`` is off. Megatron would then divide gradients by the number of ranks, although
            the losses are already divided by their global counts.
    """
    if not config.calculate_per_token_loss:
        raise ValueError("TransformerConfig.calculate_per_token_loss must be True, because gradients are sums here and not averages")
    return [
        # Each module has its own config, because DDP writes its default bucket size into it.
        DistributedDataParallel(config, _ddp_config(settings), module, disable_bucketing=index > 0 and not settings.overlap_grad_reduce)
        for index, module in enumerate(modules)
    ]


def wrap_over_world(config: TransformerConfig, module: torch.nn.Module, settings: OptimizerSettings) -> DistributedDataParallel:
    """Wrap a module that is complete on every rank: data-parallel over the world, whatever the decoder's parallel sizes.

    Its optimizer state is sharded once over the world (``distributed_optimizer_instances`` is for the decoder).
    """
    ddp_config = _ddp_config(replace(settings, distributed_optimizer_instances=1))
    return DistributedDataParallel(
        config, ddp_config, module, disable_bucketing=not settings.overlap_grad_reduce, pg_collection=_world_groups()
    )


def gradient_buffers(module: DistributedDataParallel) -> list[Any]:
    """Return Megatron's gradient buffers of a module. Experts that are divided over ranks have buffers of their own."""
    return [*module.buffers, *module.expert_parallel_buffers]


def _world_groups() -> ProcessGroupCollection:
    """Return Megatron's process groups for a module that is only data-parallel."""
    world, single_rank = dist.group.WORLD, _group_of_this_rank()
    groups = {"dp": world, "dp_cp": world, "intra_dist_opt": world}
    groups |= dict.fromkeys(("tp", "pp", "ep", "mp", "cp", "tp_ep_pp", "expt_dp"), single_rank)
    return ProcessGroupCollection(**groups)


def _group_of_this_rank() -> dist.ProcessGroup:
    """Return a process group of this rank alone. Without expert parallelism Megatron's group of its ranks is one."""
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() == 1:
        return group
    global _single_rank
    if _single_rank is None or _single_rank[0] is not dist.group.WORLD:
        _single_rank = (dist.group.WORLD, dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return _single_rank[1]


def _ddp_config(settings: OptimizerSettings) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        num_distributed_optimizer_instances=settings.distributed_optimizer_instances,
        bucket_size=settings.bucket_size,
        average_in_collective=False,
    )


def trainable_parameters(module: torch.nn.Module) -> int:
    """Return the number of parameter elements that train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def build_optimizer(
    modules: Sequence[DistributedDataParallel], settings: OptimizerSettings, over_world: DistributedDataParallel | None = None
) -> MegatronOptimizer:
    """Build AdamW over the trainable parameters of all wrapped modules. Collective over the world.

    A pipeline stage without a trainable parameter gets an optimizer that only takes part in the gradient norm.

    Args:
        modules: The wrapped modules.
        settings: The settings of the optimizer.
        over_world: A module from ``wrap_over_world``. It gets an optimizer of its own; the gradient norm is over both.

    Raises:
        ValueError: Everything is frozen on every rank.
    """
    trainable = [module for module in modules if trainable_parameters(module)]
    num_trainable = torch.tensor([len(trainable) + (over_world is not None)], device=platform.device())
    dist.all_reduce(num_trainable)
    # A dry run only knows its own rank.
    if not num_trainable.item() and not is_fake():
        raise ValueError(
            "no parameter is left to train: --freeze_llm, --freeze_vit and --freeze_und, or --visual_gen and --visual_und False, freeze "
            "the whole model. Change one of them"
        )
    config = _optimizer_config(settings)
    # There are no overrides, because without weight decay biases need no group of their own.
    optimizer = get_megatron_optimizer(config, trainable or list(modules), config_overrides={}, use_gloo_process_groups=not is_fake())
    if over_world is None:
        return _in_one_pass(optimizer, settings)
    world_optimizer = get_megatron_optimizer(
        config, [over_world], config_overrides={}, use_gloo_process_groups=False, pg_collection=_world_groups()
    )
    return _in_one_pass(ChainedOptimizer([*leaf_optimizers(optimizer), *leaf_optimizers(world_optimizer)]), settings)


def _in_one_pass(optimizer: MegatronOptimizer, settings: OptimizerSettings) -> MegatronOptimizer:
    """Give Megatron's optimizers the update in one pass, if it is asked for. Sharding, gradients and checkpoints stay theirs."""
    if settings.one_pass:
        for leaf in leaf_optimizers(optimizer):
            if not getattr(leaf, "is_stub_optimizer", False):
                leaf.optimizer = OnePassAdamW(leaf.optimizer.param_groups, settings.state_dtype)
    return optimizer


def _optimizer_config(settings: OptimizerSettings) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=0.0,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.max_grad_norm,
        bf16=settings.bf16,
        params_dtype=torch.bfloat16 if settings.bf16 else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
        **(offload_settings(settings.offload_fraction, settings.overlap_offload) if settings.offload_fraction else {}),
    )


def finalize_gradients(model: Sequence[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Finish the reductions without dividing by Megatron's token count (``config.finalize_model_grads_func``).

    The schedules pass ``num_tokens``. It is not used, because the losses are already divided by the exact global counts.
    """
    del num_tokens
    finalize_model_grads(list(model), None, **kwargs)
    _sum_adapter_gradients(model)


def _sum_adapter_gradients(model: Sequence[DistributedDataParallel]) -> None:
    """Sum the gradients of the factors of adapters that tensor-parallel ranks have whole, because each saw a part of the linear."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    parameters: list[Any] = [p for module in model for p in module.parameters() if p.requires_grad and getattr(p, SUMMED_OVER_TP, False)]
    if parameters:
        summed = _flatten_dense_tensors([parameter.main_grad for parameter in parameters])
        dist.all_reduce(summed, group=group)
        for parameter, gradient in zip(parameters, _unflatten_dense_tensors(summed, [p.main_grad for p in parameters]), strict=True):
            parameter.main_grad.copy_(gradient)


def optimizer_step(optimizer: MegatronOptimizer) -> StepOutcome:
    """Clip the gradients by min(1, max_norm / (norm + 1e-6)) and update the weights."""
    norm = gradient_norm(optimizer)
    update_weights(optimizer, norm)
    return StepOutcome(updated=True, grad_norm=norm)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Return the global L2 norm of the finished gradients. Collective. It changes no weight and may be called again.

    Together with ``update_weights`` it is Megatron's ``optimizer.step()``, split where an update can still be left out. Without a loss
    scale (fp16 is not supported) Megatron itself does not look for numbers that are not finite.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update_weights(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients by their ``norm`` from ``gradient_norm``, and update the weights."""
    for leaf in leaf_optimizers(optimizer):
        parameters = [] if getattr(leaf, "is_stub_optimizer", False) else leaf.get_parameters()
        if parameters and leaf.config.clip_grad > 0:
            # The hybrid optimizer has its gradients under another name.
            decoupled = leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, max_norm=leaf.config.clip_grad, total_norm=norm, use_decoupled_grad=decoupled)
    optimizer.step_with_ready_grads()


@contextmanager
def synced_parameters(modules: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Complete the model weights of every rank for the duration of the block, for evaluation, export and checkpoints.

    With ``overlap_param_gather`` other ranks receive updated weights only when the next forward pass asks for them. The hooks that
    do so are removed within the block. Blocks may be nested; an inner block has no hooks to remove.
    """
    overlapped = [
        module for module in modules
        if module.ddp_config.overlap_param_gather and module.use_forward_hook and module.remove_forward_pre_hook_handles
    ]  # fmt: skip
    for module in overlapped:
        module.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for module in overlapped:
            module.enable_forward_pre_hook()


@dataclass(frozen=True)
class OwnedSlice:
    """The elements [start, stop) of a flattened parameter that this rank of ``group`` updates and averages.

    ``instance`` is the number of the copy if several groups hold the same slices (``distributed_optimizer_instances`` above 1).
    ``main`` returns the main weights of the slice if the hybrid optimizer holds them.
    """

    start: int
    stop: int
    group: dist.ProcessGroup
    instance: int = 0
    main: Callable[[], torch.Tensor] | None = None


def leaf_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers in Megatron's chain, or the optimizer itself if it is not a chain."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def owned_slices(
    optimizer: MegatronOptimizer, parameters: Sequence[torch.nn.Parameter], groups: Sequence[dist.ProcessGroup]
) -> list[OwnedSlice]:
    """Return the slice of each trainable parameter that belongs to this rank.

    With the distributed optimizer it is the slice whose fp32 main weight is on this rank; it may be empty. Without it every rank has
    all main weights, and each parameter is sliced evenly over the ranks of its data-parallel group.

    Args:
        optimizer: The optimizer from ``build_optimizer``.
        parameters: The trainable parameters.
        groups: The data-parallel group of each parameter.
    """
    sharded = [leaf for leaf in leaf_optimizers(optimizer) if isinstance(leaf, DistributedOptimizer) and not leaf.is_stub_optimizer]
    if not sharded:
        return [_even_slice(parameter.numel(), group) for parameter, group in zip(parameters, groups, strict=True)]
    return [_distributed_slice(sharded, parameter) for parameter in parameters]


def _even_slice(numel: int, group: dist.ProcessGroup) -> OwnedSlice:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return OwnedSlice(numel * rank // size, numel * (rank + 1) // size, group)


def _distributed_slice(leaves: Sequence[DistributedOptimizer], parameter: torch.nn.Parameter) -> OwnedSlice:
    owner = next((leaf for leaf in leaves if any(parameter in buffer.param_index_map for buffer in leaf.buffers)), None)
    if owner is None:
        raise ValueError(
            f"a trainable parameter of shape {tuple(parameter.shape)} is in no gradient buffer; was it unfrozen after wrap_ddp?"
        )
    if parameter not in owner.model_param_gbuf_map:
        return OwnedSlice(0, 0, owner.data_parallel_group, owner.distributed_optimizer_instance_id)
    piece = owner._get_model_param_range_map(parameter)["param"]
    main = partial(hybrid_main_weight, owner, parameter) if is_hybrid(owner) else None
    return OwnedSlice(piece.start, piece.end, owner.data_parallel_group, owner.distributed_optimizer_instance_id, main)


def main_weight_slice(parameter: torch.nn.Parameter, owned: OwnedSlice) -> torch.Tensor:
    """Return this rank's slice of the fp32 main weight, flat. The main weight of an fp32 parameter is the parameter."""
    if owned.main is not None:
        return owned.main()
    main = getattr(parameter, "main_param", None)
    if main is None:
        if parameter.dtype != torch.float32 and owned.stop > owned.start:
            raise ValueError(f"a {parameter.dtype} parameter of shape {tuple(parameter.shape)} has no fp32 main weight")
        return parameter.detach().reshape(-1)[owned.start : owned.stop].float()
    if getattr(parameter, "main_param_sharded", False):
        return main.detach()
    return main.detach().reshape(-1)[owned.start : owned.stop]
