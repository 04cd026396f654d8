"""Megatron's DDP and optimizer over the decoder chunks and the vision tower, set up so that gradients are plain sums.

One AdamW group without weight decay (the original's). The losses are already divided by their global counts
(losses.py), so gradients are summed over ranks and microbatches and never averaged. Frozen parameters stay outside of the
gradient buffers and of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from megatron_bagel import platform
from megatron_bagel.platform.launch.fake_world import is_fake


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and where its state lives. eps 1e-15 is the original's: almost a sign update where gradients are tiny.

    ``max_grad_norm`` 0 turns clipping off; the norm is reported either way. ``use_distributed_optimizer`` splits fp32 main
    weights and moments over the data-parallel ranks; the two overlap flags need it or, for reduction alone, a GPU's streams to
    pay off. ``distributed_optimizer_instances`` above 1 shards inside groups of ranks and replicates between them.
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

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: without sharded weights "
                "there is nothing to gather. Add both or drop it."
            )
        if self.distributed_optimizer_instances > 1 and not self.use_distributed_optimizer:
            raise ValueError("--num-distributed-optimizer-instances above 1 needs --use-distributed-optimizer.")


@dataclass(frozen=True)
class StepOutcome:
    """Result of one optimizer step. ``grad_norm`` is the global L2 norm before clipping."""

    updated: bool
    grad_norm: float


def wrap_ddp(config: TransformerConfig, modules: Sequence[torch.nn.Module], settings: OptimizerSettings) -> list[DistributedDataParallel]:
    """Wrap each module (decoder chunks in order, then the vision tower) with its own gradient buffers.

    Raises ValueError if ``config.calculate_per_token_loss`` is off: Megatron would then divide gradients by the number of
    ranks, and the losses of this project are divided by their global counts already.
    """
    if not config.calculate_per_token_loss:
        raise ValueError("TransformerConfig.calculate_per_token_loss must be True: gradients of this project are sums, not averages.")
    return [
        # A config each: DDP writes its defaults (bucket size) into the one it is given.
        DistributedDataParallel(config, _ddp_config(settings), module, disable_bucketing=index > 0 and not settings.overlap_grad_reduce)
        for index, module in enumerate(modules)
    ]


def wrap_over_world(config: TransformerConfig, module: torch.nn.Module, settings: OptimizerSettings) -> DistributedDataParallel:
    """Wrap a module that is whole on every rank: data-parallel over the world, whatever the decoder's layout.

    Its optimizer state is sharded over the world once (``distributed_optimizer_instances`` is for the decoder).
    """
    own = _ddp_config(replace(settings, distributed_optimizer_instances=1))
    return DistributedDataParallel(config, own, module, disable_bucketing=not settings.overlap_grad_reduce, pg_collection=_world_groups())


def _world_groups() -> ProcessGroupCollection:
    """Megatron's groups for a module that only data parallelism touches."""
    everyone = dist.group.WORLD
    # Expert parallelism is never used here, so its group is this rank by itself.
    alone = parallel_state.get_expert_model_parallel_group()
    groups = {"dp": everyone, "dp_cp": everyone, "intra_dist_opt": everyone}
    groups |= dict.fromkeys(("tp", "pp", "ep", "mp", "cp", "tp_ep_pp", "expt_dp"), alone)
    return ProcessGroupCollection(**groups)


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
    """Number of parameter elements that will get gradients."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def build_optimizer(
    modules: Sequence[DistributedDataParallel], settings: OptimizerSettings, over_world: DistributedDataParallel | None = None
) -> MegatronOptimizer:
    """AdamW over the trainable parameters of all wrapped modules. Raises ValueError when everything is frozen, on every rank.

    ``over_world`` (from `wrap_over_world`) gets an optimizer of its own beside the others', with one gradient norm over all. A
    pipeline stage without any trainable parameter gets one that only takes part in that norm. Collective over the world.
    """
    trainable = [module for module in modules if trainable_parameters(module)]
    anywhere = torch.tensor([len(trainable) + (over_world is not None)], device=platform.device())
    dist.all_reduce(anywhere)
    # A rehearsal knows of its own rank alone.
    if not anywhere.item() and not is_fake():
        raise ValueError(
            "No parameter is left to train: the freeze flags (freeze_llm, freeze_vit, freeze_und) together with visual_gen / "
            "visual_und off freeze the whole model. Drop one of them."
        )
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        weight_decay=0.0,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.max_grad_norm,
        bf16=settings.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    # No overrides: without weight decay there is no reason to split biases into a group of their own.
    optimizer = get_megatron_optimizer(config, trainable or list(modules), config_overrides={}, use_gloo_process_groups=not is_fake())
    if over_world is None:
        return optimizer
    apart = get_megatron_optimizer(config, [over_world], config_overrides={}, use_gloo_process_groups=False, pg_collection=_world_groups())
    return ChainedOptimizer([*leaf_optimizers(optimizer), *leaf_optimizers(apart)])


def finalize_gradients(model: Sequence[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """``config.finalize_model_grads_func``: finish the reductions, but do not divide by Megatron's token count.

    ``num_tokens`` is accepted because the schedules pass it; the losses were divided by the exact global counts already.
    """
    del num_tokens
    finalize_model_grads(list(model), None, **kwargs)


def optimizer_step(optimizer: MegatronOptimizer) -> StepOutcome:
    """Clip by coef = min(1, max_norm / (norm + 1e-6)) and update."""
    norm = gradient_norm(optimizer)
    update_weights(optimizer, norm)
    return StepOutcome(updated=True, grad_norm=norm)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The global L2 norm of the finished gradients. Collective. No weight is touched; may be called again for other gradients.

    With ``update_weights`` it is Megatron's ``optimizer.step()``, cut where an update can still be left out: without a loss scale (fp16 is
    not offered) Megatron itself does not look for numbers that are not finite.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update_weights(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients that ``gradient_norm`` was just called for, and update."""
    for leaf in leaf_optimizers(optimizer):
        parameters = [] if getattr(leaf, "is_stub_optimizer", False) else leaf.get_parameters()
        if parameters and leaf.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=leaf.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()


@contextmanager
def synced_parameters(modules: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Within the block every rank's model weights are complete, for evaluation, export and checkpoints.

    With ``overlap_param_gather`` the weights of an update arrive on other ranks only as the next forward pass asks for them;
    the hooks that do so are taken off inside the block. Blocks may be nested: an inner one finds no hooks.
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
    """The elements [start, stop) of a flattened parameter that this rank of ``group`` updates or keeps the EMA of.

    ``instance`` numbers the copy when several groups hold the same slices (distributed_optimizer_instances > 1).
    """

    start: int
    stop: int
    group: dist.ProcessGroup
    instance: int = 0


def leaf_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside Megatron's chain (the optimizer itself if it is not one)."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def owned_slices(
    optimizer: MegatronOptimizer, parameters: Sequence[torch.nn.Parameter], groups: Sequence[dist.ProcessGroup]
) -> list[OwnedSlice]:
    """Slice of each trainable parameter that belongs to this rank.

    With the distributed optimizer it is the slice whose fp32 main weight lives here (empty if none does). Without it every
    rank holds all main weights, and each parameter is cut evenly over the ranks of its data-parallel group, one of ``groups`` each.
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
            f"A trainable parameter of shape {tuple(parameter.shape)} is in no gradient buffer; was it unfrozen after wrap_ddp?"
        )
    if parameter not in owner.model_param_gbuf_map:
        return OwnedSlice(0, 0, owner.data_parallel_group, owner.distributed_optimizer_instance_id)
    piece = owner._get_model_param_range_map(parameter)["param"]
    return OwnedSlice(piece.start, piece.end, owner.data_parallel_group, owner.distributed_optimizer_instance_id)


def main_weight_slice(parameter: torch.nn.Parameter, owned: OwnedSlice) -> torch.Tensor:
    """This rank's slice of the fp32 main weight, flat; the parameter itself when it is fp32 already."""
    main = getattr(parameter, "main_param", None)
    if main is None:
        if parameter.dtype != torch.float32 and owned.stop > owned.start:
            raise ValueError(f"No fp32 main weight for a {parameter.dtype} parameter of shape {tuple(parameter.shape)}.")
        return parameter.detach().reshape(-1)[owned.start : owned.stop].float()
    if getattr(parameter, "main_param_sharded", False):
        return main.detach()
    return main.detach().reshape(-1)[owned.start : owned.stop]
