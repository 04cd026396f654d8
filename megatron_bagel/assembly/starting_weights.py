"""Where a run's weights come from: the checkpoint it continues, the checkpoint or model folder it takes them from, or pretrained parts.

Weights never come from chance unless ``--init_random`` says so: every source is strict about what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_bagel.assembly.modules import Modules
from megatron_bagel.assembly.opened_model import checkpoint_at
from megatron_bagel.checkpoint.dist.state import load_weights_only
from megatron_bagel.checkpoint.dist.step_folders import is_complete, latest_checkpoint, unusable_only
from megatron_bagel.checkpoint.dist.stored_run import foreign, trained_steps
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights, initial_value
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch


@dataclass(frozen=True)
class InitialSettings:
    """What weights are before anything is trained.

    Attributes:
        seed: seed of the weights that no file holds.
        llm: folder of the pretrained decoder; None starts it from random weights.
        vit: folder of the pretrained vision tower; None starts it from random weights, where there is one.
        allow_missing: patterns of weights that a source may lack and that then keep their seeded values.
        copy_init_moe: whether the generation expert starts as a copy of the understanding expert.
    """

    seed: int
    llm: str | None
    vit: str | None
    allow_missing: Sequence[str] = ()
    copy_init_moe: bool = True


@dataclass(frozen=True)
class StartSettings:
    """Where a run starts.

    Attributes:
        checkpoint_dir: folder of the run's own checkpoints.
        auto_resume: whether the newest of them is continued, where there is one.
        resume_from: checkpoint or model folder to start from otherwise.
        model_only: whether only weights are taken from ``resume_from``.
        from_ema: whether these are the averaged ones.
        verify: whether checksums are compared before a checkpoint is loaded.
        initial: the weights of a run that continues nothing.
        overwrite: whether an earlier run in the folders is moved aside.
        run_id: the run, where it is known; checkpoints that name another one are not continued.
    """

    checkpoint_dir: Path
    auto_resume: bool
    resume_from: Path | None
    model_only: bool
    from_ema: bool
    verify: bool
    initial: InitialSettings
    overwrite: bool = False
    run_id: str = ""


@dataclass(frozen=True)
class WeightSource:
    """Where a run starts. ``checkpoint`` continues everything; else ``weights`` ("model" or "ema") of ``folder``, else pretrained parts."""

    checkpoint: Path | None = None
    folder: Path | None = None
    weights: str = "model"

    def describe(self, initial: InitialSettings) -> str:
        """One sentence for the log."""
        if self.checkpoint is not None:
            return f"continuing from {self.checkpoint}"
        if self.folder is not None:
            return f"starting from the {self.weights} weights of {self.folder}"
        if initial.llm is None:
            return f"starting from random weights (--init_random, seed {initial.seed})"
        return f"starting from {initial.llm} and {initial.vit or 'no ViT'}"


def weight_source(settings: StartSettings, damaged: Sequence[Path] = ()) -> WeightSource:
    """Decide from the resume flags, the newest checkpoint that is not in ``damaged`` winning with ``auto_resume`` as in the original.

    Raises ValueError for a ``resume_from`` that is neither a checkpoint nor a model folder, and for a run whose checkpoints are all
    damaged: it must not begin anew unnoticed.
    """
    if settings.auto_resume:
        others = foreign(trained_steps(settings.checkpoint_dir), settings.run_id)
        newest = latest_checkpoint(settings.checkpoint_dir, excluded=[*damaged, *others])
        if newest is not None:
            return WeightSource(checkpoint=newest)
        gone = {*damaged, *unusable_only(settings.checkpoint_dir)}
        if gone:
            raise ValueError(
                f"no checkpoint in {settings.checkpoint_dir} can be used: {', '.join(sorted(map(str, gone)))}. Copy one of them again, or "
                "remove them to start anew"
            )
    path = settings.resume_from
    if path is None:
        return WeightSource()
    checkpoint = checkpoint_at(path)
    if checkpoint is not None:
        if settings.model_only:
            return WeightSource(folder=checkpoint, weights="ema" if settings.from_ema else "model")
        return WeightSource(checkpoint=checkpoint)
    folder = HFFolder(path)
    if not settings.model_only:
        raise ValueError(
            f"--resume_from {path} is a model folder: it has weights, but no optimizer state, step or data position to resume. "
            "Pass --resume_model_only True to start from its weights"
        )
    return WeightSource(folder=path, weights=_stored(folder, settings.from_ema))


def _stored(folder: HFFolder, ema: bool) -> str:
    """Which file to take: the one asked for, or the only one there (a released folder has EMA weights alone)."""
    return "ema" if ema or folder.available_weights() == ["ema"] else "model"


def load_first_weights(initial: InitialSettings, source: WeightSource, modules: Modules, arch: BagelArch) -> None:
    """Fill the modules for a run that does not continue a checkpoint."""
    if source.folder is not None:
        load_folder(initial, source.folder, source.weights, modules, arch)
        return
    first = InitialWeights.of(arch, initial.seed, initial.llm, initial.vit, initial.allow_missing, initial.copy_init_moe)
    first.fill(list(modules.named.values()))


def average_source(source: WeightSource) -> str | None:
    """ "ema" when a model-only start finds an average of its own beside the weights it takes, as the original loads both."""
    if source.folder is None or source.weights == "ema":
        return None
    if is_complete(source.folder):
        return "ema"
    return "ema" if "ema" in HFFolder(source.folder).available_weights() else None


def load_folder(initial: InitialSettings, folder: Path, weights: str, modules: Modules, arch: BagelArch) -> None:
    """Fill the modules from a checkpoint or a model folder, weights only."""
    seeded = partial(initial_value, arch=arch, seed=initial.seed)
    if is_complete(folder):
        load_weights_only(folder, modules.named, arch, weights, initial.allow_missing, seeded)
        return
    parts = list(modules.named.values())
    load_weights(HFFolder(folder).weights(weights), WeightMap(arch), parts, initial.allow_missing, initial_value=seeded)
