# SPDX-License-Identifier: Apache-2.0
"""Builds what a run trains: modules in Megatron's DDP, their optimizer, average and schedule, and the image encoder."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_bagel import platform
from megatron_bagel.assembly.adapter_start import adapter_of_run, fill_adapters, load_base
from megatron_bagel.assembly.modules import Modules, build_modules, freeze_modules
from megatron_bagel.assembly.starting_weights import InitialSettings, WeightSource, average_source, load_first_weights, load_folder
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.dist.stored_adapter import StoredAdapter
from megatron_bagel.checkpoint.hf.base_identity import BaseIdentity
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.data.loading.encoder_assignment import EncodingShare
from megatron_bagel.encoders.image_encoding import ImageEncoder
from megatron_bagel.encoders.sharded_image_encoding import ShardedImageEncoder
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.parallel.replica import Replica
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.lr_schedule import LearningRate
from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, trainable_parameters, wrap_ddp, wrap_over_world
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.step import Trainable


def build_trainable(
    resolved: ResolvedRun, source: WeightSource | None, replica: Replica | None, share: EncodingShare | None
) -> tuple[Trainable, Trained]:
    """Build the modules, the optimizer, the average and the schedule of a run.

    Args:
        resolved: The settings of the run.
        source: The weights to start from. Without a source everything has its shape and no memory (inside ``on_meta``).
        replica: The replica of this rank, if its ranks share the encoding of images.
        share: This rank's share of the encoding, given if and only if ``replica`` is.

    Returns:
        What a step changes, and the same modules and states under the names of a checkpoint.

    Raises:
        ValueError: Only one of ``replica`` and ``share`` is given, or nothing is left to train.
    """
    if (replica is None) != (share is None):
        raise ValueError("build_trainable needs both a replica and this rank's share of the encoding of images, or neither")
    adapter = _adapter(resolved, source)
    tcfg, modules = _build_modules(resolved, source, adapter)
    tower_trains = modules.tower is not None and trainable_parameters(modules.tower) > 0
    wrapped, optimizer = _wrap_modules(resolved.optimizer, tcfg, modules, tower_trains, over_world=replica is not None)
    wrapped_decoder = wrapped[: len(modules.decoder)]
    wrapped_tower = wrapped[-1] if tower_trains else None
    tcfg.grad_scale_func = optimizer.scale_loss
    if resolved.megatron.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped_decoder]
        tcfg.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    names = [name for name, part in modules.named.items() if part in _trained_parts(modules, tower_trains)]
    ema = ShardedEma(dict(zip(names, wrapped, strict=True)), optimizer, resolved.ema_decay, resolved.ema_warmup)
    if source is not None and adapter is None:
        _load_separate_average(resolved.start.initial, source, modules, resolved.arch, optimizer, ema)
    encoders = resolved.arch, modules.tower if wrapped_tower is None else wrapped_tower, modules.autoencoder, resolved.encoding
    trainable = Trainable(
        config=tcfg,
        decoder=wrapped_decoder,
        tower=wrapped_tower,
        image_encoder=ImageEncoder(*encoders) if replica is None or share is None else ShardedImageEncoder(*encoders, replica, share),
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, resolved.schedule),
        ema=ema,
    )
    return trainable, Trained(modules.named, resolved.arch, optimizer, ema, adapter)


def _adapter(resolved: ResolvedRun, source: WeightSource | None) -> StoredAdapter | None:
    """Return the adapters of the run and their base, which rank 0 reads for all, or None without adapters. A dry run has no base."""
    lora = resolved.build.frozen.lora
    if lora is None:
        return None
    if source is None:
        return StoredAdapter(lora, BaseIdentity("", "model", ""))
    return on_first_rank(lambda: adapter_of_run(lora, source, resolved.start), "cannot train adapters")


def _build_modules(resolved: ResolvedRun, source: WeightSource | None, adapter: StoredAdapter | None) -> tuple[TransformerConfig, Modules]:
    """Build the modules, fill them unless a checkpoint will, and freeze what does not train."""
    arch, megatron = resolved.arch, resolved.megatron
    # Local modules are made without memory and filled later; Megatron-Core would draw their first weights on the GPU.
    on_cpu = not platform.has_gpu() or megatron.transformer_impl == "local"
    tcfg = transformer_config(arch.llm, megatron, resolved.sizes.bf16, on_cpu=on_cpu)
    modules = build_modules(resolved.build, arch, tcfg, shapes_only=source is None)
    if source is not None and adapter is not None:
        load_base(resolved.start.initial, adapter.base, modules, arch)
        if source.checkpoint is None:
            fill_adapters(source, adapter, modules, arch, resolved.seed)
    elif source is not None and source.checkpoint is None:
        load_first_weights(resolved.start.initial, source, modules, arch)
    freeze_modules(resolved.build.frozen, modules)
    return tcfg, modules


def _trained_parts(modules: Modules, tower_trains: bool) -> list[nn.Module]:
    """Return the chunks of the decoder and, if it trains, the vision tower."""
    return [*modules.decoder, *([modules.tower] if tower_trains and modules.tower is not None else [])]


def _wrap_modules(
    settings: OptimizerSettings, tcfg: TransformerConfig, modules: Modules, tower_trains: bool, over_world: bool
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wrap the parts that train, the tower last, and build their optimizer. ``over_world`` makes the tower data-parallel over all ranks."""
    if not over_world or not tower_trains or modules.tower is None:
        wrapped = wrap_ddp(tcfg, _trained_parts(modules, tower_trains), settings)
        return wrapped, build_optimizer(wrapped, settings)
    tower = wrap_over_world(tcfg, modules.tower, settings)
    decoder = wrap_ddp(tcfg, modules.decoder, settings)
    return [*decoder, tower], build_optimizer(decoder, settings, over_world=tower)


def _load_separate_average(
    initial: InitialSettings, source: WeightSource, modules: Modules, arch: BagelArch, optimizer: Any, ema: ShardedEma
) -> None:
    """Start the average from the EMA file of ``source`` if it stores weights and average in separate files, as the original does."""
    if average_source(source) is None:
        return
    load_folder(initial, source, "ema", modules, arch)
    optimizer.reload_model_params()
    ema.reset()
    load_folder(initial, source, source.weights, modules, arch)
    optimizer.reload_model_params()
