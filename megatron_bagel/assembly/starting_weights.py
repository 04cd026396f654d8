# SPDX-License-Identifier: Apache-2.0
"""Chooses and loads a run's first weights: from the checkpoint it continues, another checkpoint, a model folder, or pretrained parts.

Weights are random only with ``--init_random``. Every source must have all weights of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.assembly.modules import Modules
from megatron_bagel.assembly.opened_model import checkpoint_at
from megatron_bagel.checkpoint.dist.load import load_weights_only
from megatron_bagel.checkpoint.dist.step_folders import is_complete, latest_checkpoint, unusable_only
from megatron_bagel.checkpoint.dist.stored_run import foreign, trained_steps
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights, initial_value
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.pretrained import grown_source
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch, ConfigSources


@dataclass(frozen=True)
class InitialSettings:
    """Settings of the weights of a run that starts from scratch.

    Attributes:
        seed: The seed of weights that are in no file.
        llm: The folder of the pretrained decoder; None for random weights.
        vit: The folder of the pretrained vision tower; None for random weights, if the model has a tower.
        allow_missing: Patterns of weights that a source may lack. They keep their seeded values.
        copy_init_moe: Whether the generation expert starts as a copy of the understanding expert.
        check_weights: How many values of each weight that is loaded are checked to be finite.
        grow_vocabulary: Whether a model folder's vocabulary grows to the tokenizer's, with seeded rows.
    """

    seed: int
    llm: str | None
    vit: str | None
    allow_missing: Sequence[str] = ()
    copy_init_moe: bool = True
    check_weights: WeightCheck = "sampled"
    grow_vocabulary: bool = False


@dataclass(frozen=True)
class StartSettings:
    """Settings of the starting point of a run.

    Attributes:
        checkpoint_dir: The folder of the run's own checkpoints.
        auto_resume: Whether the run continues from the newest of them, if there is one.
        resume_from: The checkpoint or model folder to start from otherwise.
        model_only: Whether only weights are loaded from ``resume_from``.
        from_ema: Whether these are the averaged weights.
        verify: Whether checksums are compared before a checkpoint is loaded.
        initial: The weights of a run that starts from scratch.
        overwrite: Whether an earlier run in the folders is moved aside.
        weights_name: The name of the weight file in the model folder ``resume_from``, if it has another name than usual.
        run_id: The identity of the run, if it is known. Checkpoints that name another run are not continued.
        adapter_base: Where the base of a checkpoint of adapters is now, if it has moved.
    """

    checkpoint_dir: Path
    auto_resume: bool
    resume_from: Path | None
    model_only: bool
    from_ema: bool
    verify: bool
    initial: InitialSettings
    overwrite: bool = False
    weights_name: str | None = None
    run_id: str = ""
    adapter_base: str | None = None


@dataclass(frozen=True)
class WeightSource:
    """A run's starting point: a ``checkpoint`` to continue, else ``weights`` ("model" or "ema") of ``folder``, else pretrained parts.

    ``weights_name`` is the name of the folder's weight file, if it has another name than usual.
    """

    checkpoint: Path | None = None
    folder: Path | None = None
    weights: str = "model"
    weights_name: str | None = None

    def describe(self, initial: InitialSettings) -> str:
        """Return a sentence for the log."""
        if self.checkpoint is not None:
            return f"continuing from {self.checkpoint}"
        if self.folder is not None:
            return f"starting from the {self.weights} weights of {self.folder / (self.weights_name or '')}"
        if initial.llm is None:
            return f"starting from random weights (--init_random, seed {initial.seed})"
        return f"starting from {initial.llm} and {initial.vit or 'no ViT'}"


def weight_source(settings: StartSettings, damaged: Sequence[Path] = ()) -> WeightSource:
    """Choose the starting point by the resume flags. With ``auto_resume`` the newest checkpoint comes first, as in the original.

    Args:
        settings: The settings of the starting point.
        damaged: Checkpoints that must not be chosen.

    Raises:
        ValueError: ``resume_from`` is neither a checkpoint nor a model folder, or all checkpoints of the run are damaged. Such a run
            must not start from scratch unnoticed.
    """
    if settings.auto_resume:
        others = foreign(trained_steps(settings.checkpoint_dir), settings.run_id)
        newest = latest_checkpoint(settings.checkpoint_dir, excluded=[*damaged, *others])
        if newest is not None:
            return WeightSource(checkpoint=newest)
        unusable = {*damaged, *unusable_only(settings.checkpoint_dir)}
        if unusable:
            raise ValueError(
                f"no checkpoint in {settings.checkpoint_dir} can be used: {', '.join(sorted(map(str, unusable)))}. Copy one of them "
                "again, or remove them to start from scratch"
            )
    path = settings.resume_from
    if path is None:
        return WeightSource()
    checkpoint = checkpoint_at(path)
    if checkpoint is not None:
        if settings.weights_name is not None:
            raise ValueError(f"--weights_name {settings.weights_name}: --resume_from {path} is a training checkpoint, not a model folder")
        if settings.model_only:
            return WeightSource(folder=checkpoint, weights="ema" if settings.from_ema else "model")
        return WeightSource(checkpoint=checkpoint)
    folder = HFFolder(path, sources=ConfigSources(weights_name=settings.weights_name))
    if not settings.model_only:
        raise ValueError(
            f"--resume_from {path} is a model folder: it has weights, but no optimizer state, step or data position to resume. "
            "Pass --resume_model_only True to start from its weights"
        )
    return WeightSource(folder=path, weights=_available_weights(folder, settings.from_ema), weights_name=settings.weights_name)


def _available_weights(folder: HFFolder, ema: bool) -> str:
    """Return the weights to load: those requested, or the only ones in the folder (a released folder has only EMA weights)."""
    return "ema" if ema or folder.available_weights() == ["ema"] else "model"


def load_first_weights(initial: InitialSettings, source: WeightSource, modules: Modules, arch: BagelArch) -> None:
    """Fill the modules for a run that does not continue a checkpoint."""
    if source.folder is not None:
        load_folder(initial, source, source.weights, modules, arch)
        return
    weights = InitialWeights.of(
        arch, initial.seed, initial.llm, initial.vit, initial.allow_missing, initial.copy_init_moe, initial.check_weights
    )
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    weights.fill(list(modules.named.values()), forgets=alone)
    if not alone:
        # Ranks of a machine share what the first of them read from the disk, so files leave memory only when the last one has read them.
        dist.barrier()
        weights.forget_files()


def average_source(source: WeightSource) -> str | None:
    """Return "ema" if a start from weights only has a separate average in the same folder, because the original loads both; else None."""
    if source.folder is None or source.weights == "ema":
        return None
    if is_complete(source.folder):
        return "ema"
    return "ema" if "ema" in _model_folder(source, source.folder).available_weights() else None


def load_folder(initial: InitialSettings, source: WeightSource, weights: str, modules: Modules, arch: BagelArch) -> None:
    """Fill the modules with the ``weights`` ("model" or "ema") of the source's folder: a checkpoint or a model folder."""
    folder = source.folder
    if folder is None:
        raise ValueError(f"{source} has no folder to load from")
    seeded_value = partial(initial_value, arch=arch, seed=initial.seed)
    if is_complete(folder):
        load_weights_only(folder, modules.named, arch, weights, initial.allow_missing, seeded_value, initial.check_weights)
        return
    parts = list(modules.named.values())
    reader, weight_map = _model_folder(source, folder).weights(weights, initial.check_weights), WeightMap(arch)
    tensors = grown_source(reader, weight_map, seeded_value) if initial.grow_vocabulary else reader
    load_weights(tensors, weight_map, parts, initial.allow_missing, initial_value=seeded_value)


def _model_folder(source: WeightSource, folder: Path) -> HFFolder:
    return HFFolder(folder, sources=ConfigSources(weights_name=source.weights_name))
