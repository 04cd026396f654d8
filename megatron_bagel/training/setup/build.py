"""What a run trains: the modules behind Megatron's DDP, their optimizer, average and schedule, and what encodes images before them."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_bagel import platform
from megatron_bagel.assembly.modules import Modules, build_modules, freeze_modules
from megatron_bagel.assembly.starting_weights import InitialSettings, WeightSource, average_source, load_first_weights, load_folder
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.data.loading.encoder_assignment import EncodingShare
from megatron_bagel.encoders.image_encoding import ImageEncoder
from megatron_bagel.encoders.sharded_image_encoding import ShardedImageEncoder
from megatron_bagel.parallel.replica import Replica
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.lr_schedule import LearningRate
from megatron_bagel.training.optim.optimizer import build_optimizer, trainable_parameters, wrap_ddp, wrap_over_world
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.step import Trainable


def build_trainable(
    resolved: ResolvedRun, source: WeightSource | None, replica: Replica | None, share: EncodingShare | None
) -> tuple[Trainable, Trained]:
    """``replica`` and this rank's ``share`` are given where the ranks of a replica share the encoding of images. Without a ``source``
    of weights everything has its shape and no memory (inside ``on_meta``)."""
    if (replica is None) != (share is None):
        raise ValueError("a replica and this rank's share of the encoding of images are given together or not at all")
    arch, megatron, optimizer_settings = resolved.arch, resolved.megatron, resolved.optimizer
    # Local modules are made without memory and filled later; Megatron-Core would draw their first weights on the GPU.
    on_cpu = not platform.has_gpu() or megatron.transformer_impl == "local"
    tcfg = transformer_config(arch.llm, megatron, resolved.sizes.bf16, on_cpu=on_cpu)
    modules = build_modules(resolved.build, arch, tcfg, shapes_only=source is None)
    if source is not None and source.checkpoint is None:
        load_first_weights(resolved.start.initial, source, modules, arch)
    freeze_modules(resolved.build.frozen, modules)
    trained_tower = modules.tower if modules.tower is not None and trainable_parameters(modules.tower) > 0 else None
    parts: list[nn.Module] = [*modules.decoder] if trained_tower is None else [*modules.decoder, trained_tower]
    if replica is not None and trained_tower is not None:
        wrapped_tower = wrap_over_world(tcfg, trained_tower, optimizer_settings)
        wrapped = [*wrap_ddp(tcfg, modules.decoder, optimizer_settings), wrapped_tower]
        optimizer = build_optimizer(wrapped[:-1], optimizer_settings, over_world=wrapped_tower)
    else:
        wrapped = wrap_ddp(tcfg, parts, optimizer_settings)
        optimizer = build_optimizer(wrapped, optimizer_settings)
    tcfg.grad_scale_func = optimizer.scale_loss
    if megatron.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped[: len(modules.decoder)]]
        tcfg.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    names = [name for name, part in modules.named.items() if part in parts]
    ema = ShardedEma(dict(zip(names, wrapped, strict=True)), optimizer, resolved.ema_decay)
    if source is not None:
        _load_average_apart(resolved.start.initial, source, modules, arch, optimizer, ema)
    tower = modules.tower if trained_tower is None else wrapped[-1]
    encoders = arch, tower, modules.autoencoder, resolved.encoding
    trainable = Trainable(
        config=tcfg,
        decoder=wrapped[: len(modules.decoder)],
        tower=None if trained_tower is None else wrapped[-1],
        image_encoder=ImageEncoder(*encoders) if replica is None or share is None else ShardedImageEncoder(*encoders, replica, share),
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, resolved.schedule),
        ema=ema,
    )
    return trainable, Trained(modules.named, arch, optimizer, ema)


def _load_average_apart(
    initial: InitialSettings, source: WeightSource, modules: Modules, arch: BagelArch, optimizer: Any, ema: ShardedEma
) -> None:
    """Start the average from the source's own EMA where weights and average are different files, as the original does."""
    if average_source(source) is None or source.folder is None:
        return
    load_folder(initial, source.folder, "ema", modules, arch)
    optimizer.reload_model_params()
    ema.reset()
    load_folder(initial, source.folder, source.weights, modules, arch)
    optimizer.reload_model_params()
