# SPDX-License-Identifier: Apache-2.0
"""The sizes and the model that follow from a configuration: batch geometry, attention backend, precision, optimizer, architecture.

The functions are pure, so every rank and every planning tool gets the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json_as
from megatron_bagel.common.wording import listed
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, ConfigSources
from megatron_bagel.config.architecture.measured_parts import decoder_of, vision_tower_of
from megatron_bagel.config.architecture.weight_files import any_weight_file, folder_shapes
from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.config.moe_rules import check_expert_world
from megatron_bagel.config.optimizer_sharding import optimizer_sharding
from megatron_bagel.config.parallel_sizes import divisors
from megatron_bagel.config.parser import Config

_MODEL_SETTINGS = (
    "latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side", "vit_select_layer", "connector_act", "interpolate_pos",
    "vit_rope",
)  # fmt: skip


@dataclass(frozen=True)
class ResolvedSizes:
    """The settings that a run derives from others.

    ``global_batch_size`` and ``num_microbatches`` (per data-parallel replica) count packs, after the ramp of ``batch_sizes``.
    """

    world_size: int
    data_parallel_size: int
    global_batch_size: int
    num_microbatches: int
    batch_sizes: BatchSizes
    attention_backend: str
    bf16: bool
    use_distributed_optimizer: bool
    distributed_optimizer_instances: int
    use_wandb: bool
    #: Lines for the start-up log: defaults that depend on the machine, and flags that mean something else than their names say.
    notes: tuple[str, ...] = ()


def resolve(config: Config, world_size: int, has_gpu: bool) -> ResolvedSizes:
    """Return the derived settings of a run.

    Args:
        config: Settings of the run.
        world_size: Number of ranks.
        has_gpu: Whether the run uses GPUs.

    Raises:
        ValueError: if sizes do not fit, with the flags and the values that would.
    """
    megatron, training, given = config.megatron, config.training, config.given
    replicas = data_parallel_size(config, world_size)
    global_batch, microbatches = _batch_geometry(config, replicas)
    batch_sizes = BatchSizes.of(global_batch, megatron.rampup_batch_size)
    _check_ramp(batch_sizes, replicas)
    for size in batch_sizes.steps:
        _check_interleaving(config, size // replicas)
    distributed, instances = optimizer_sharding(config, replicas)
    backend, notes = _attention_backend(config, has_gpu)
    bf16 = megatron.bf16 if megatron.bf16 is not None else has_gpu
    if megatron.bf16 is None:
        notes.append(f"precision: {'bfloat16 with fp32 main weights' if bf16 else 'fp32'} (choose with --bf16)")
    if "prefer_buffer_before" in given:
        notes.append("prefer_buffer_before: samples that wait for a pack always go first here, so there is nothing to set")
    wandb_flags = sorted(name for name in given if name.startswith("wandb_"))
    return ResolvedSizes(
        world_size=world_size,
        data_parallel_size=replicas,
        global_batch_size=global_batch,
        num_microbatches=microbatches,
        batch_sizes=batch_sizes,
        attention_backend=backend,
        bf16=bf16,
        use_distributed_optimizer=distributed,
        distributed_optimizer_instances=instances,
        use_wandb=bool(wandb_flags) if training.use_wandb is None else training.use_wandb,
        notes=tuple(notes),
    )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the number of replicas. Raises ValueError, with working sizes, if tensor x pipeline x context does not divide the ranks."""
    megatron = config.megatron
    axes = {
        "tensor_model_parallel_size": megatron.tensor_model_parallel_size,
        "pipeline_model_parallel_size": megatron.pipeline_model_parallel_size,
        "context_parallel_size": megatron.context_parallel_size,
    }
    for name, size in axes.items():
        if size < 1:
            raise ValueError(f"--{name} is {size}; it must be at least 1")
    model_ranks = axes["tensor_model_parallel_size"] * axes["pipeline_model_parallel_size"] * axes["context_parallel_size"]
    if world_size % model_ranks:
        product = " x ".join(f"--{name} {size}" for name, size in axes.items())
        raise ValueError(
            f"{product} = {model_ranks} ranks per replica do not divide the {world_size} ranks of this run; "
            f"their product can be {listed(divisors(world_size))}"
        )
    check_expert_world(megatron, world_size)
    return world_size // model_ranks


def _batch_geometry(config: Config, data_parallel: int) -> tuple[int, int]:
    accumulation, global_batch = config.training.gradient_accumulation_steps, config.megatron.global_batch_size
    if accumulation < 1:
        raise ValueError(f"--gradient_accumulation_steps is {accumulation}; it must be at least 1")
    if global_batch is None:
        return data_parallel * accumulation, accumulation
    if global_batch < 1 or global_batch % data_parallel:
        nearest_size = max(1, round(global_batch / data_parallel)) * data_parallel
        raise ValueError(
            f"--global_batch_size {global_batch} (packs) is not a multiple of the {data_parallel} data-parallel replicas; "
            f"{nearest_size} would be"
        )
    microbatches = global_batch // data_parallel
    if "gradient_accumulation_steps" in config.given and accumulation != microbatches:
        raise ValueError(
            f"--global_batch_size {global_batch} on {data_parallel} replicas is {microbatches} packs per replica, "
            f"but --gradient_accumulation_steps says {accumulation}; give one of them"
        )
    return global_batch, microbatches


def _check_ramp(sizes: BatchSizes, data_parallel: int) -> None:
    uneven_sizes = [size for size in sizes.steps if size % data_parallel]
    if uneven_sizes:
        raise ValueError(
            f"--rampup_batch_size: global batches of {listed(uneven_sizes)} packs are not multiples of the {data_parallel} data-parallel "
            f"replicas; let START ({sizes.start}) and INCREMENT ({sizes.increment}) be multiples"
        )


def _check_interleaving(config: Config, microbatches: int) -> None:
    """Check that Megatron's interleaved schedule can send microbatches in groups of as many as there are stages."""
    megatron, stages = config.megatron, config.megatron.pipeline_model_parallel_size
    interleaved = (megatron.virtual_pipeline_model_parallel_size or 1) > 1 or megatron.num_layers_per_virtual_pipeline_stage is not None
    if interleaved and microbatches % stages:
        raise ValueError(
            f"{microbatches} packs per replica and step do not divide into groups of {stages}, as interleaving over "
            f"--pipeline_model_parallel_size {stages} needs; raise --global_batch_size to {-(-microbatches // stages) * stages} per replica"
        )


def _attention_backend(config: Config, has_gpu: bool) -> tuple[str, list[str]]:
    requested_backend, use_flex, given = config.megatron.attention_backend, config.training.use_flex, "use_flex" in config.given
    if requested_backend != "auto":
        is_flex = requested_backend in ("flex", "flex_flash")
        if given and use_flex != is_flex:
            raise ValueError(f"--use_flex {use_flex} and --attention_backend {requested_backend} contradict each other; give one of them")
        if is_flex and not has_gpu:
            raise ValueError(
                f"--attention_backend {requested_backend} needs a GPU: FlexAttention has no backward pass on CPU; use auto or sdpa"
            )
        return requested_backend, []
    backend = "flex" if has_gpu and (use_flex or not given) else "sdpa"
    if given and use_flex and backend == "sdpa":
        return backend, ["use_flex: FlexAttention has no backward pass on CPU; attention runs on sdpa, with the same results"]
    return backend, []


def architecture(config: Config) -> BagelArch:
    """Return the model that the flags describe, read from model_path (finetune_from_hf) or from llm_path, vit_path and vae_path.

    Given flags win over a folder's config.json. Flags that were not given follow it.

    Raises:
        ValueError: with the flag and the file that is missing or wrong.
    """
    model, training = config.model, config.training
    llm: dict[str, Any] = {
        "layer_module": model.layer_module,
        "qk_norm": model.llm_qk_norm,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    experts = config.megatron.llm_settings()
    settings = {name: getattr(model, name) for name in _MODEL_SETTINGS} | {"timestep_shift": training.timestep_shift}
    latents = Path(config.data.latent_cache) / "latents.json" if config.data.latent_cache is not None and training.visual_gen else None
    cached_autoencoder = AutoencoderArch.beside(latents) if latents is not None else None
    if training.finetune_from_hf:
        flag_of = {"qk_norm": "llm_qk_norm"}
        arch = BagelArch.from_hf_folder(
            Path(model.model_path),
            llm={**{name: value for name, value in llm.items() if flag_of.get(name, name) in config.given}, **experts},
            defaults=settings,
            sources=ConfigSources(None, None, training.weights_name, starting_folder(config), cached_autoencoder),
            **{name: value for name, value in settings.items() if name in config.given},
        )
        arch = replace(arch, vit=arch.vit if training.visual_und else None, autoencoder=arch.autoencoder if training.visual_gen else None)
    else:
        weights = starting_folder(config)
        shapes = folder_shapes(weights, training.weights_name) if weights is not None else {}
        llm_file, vit_file = Path(model.llm_path) / "config.json", Path(model.vit_path) / "config.json"
        arch = BagelArch(
            llm=read_json_as(partial(decoder_of, shapes, {**llm, **experts}, llm_file), llm_file, "--llm_path"),
            vit=read_json_as(partial(vision_tower_of, shapes), vit_file, "--vit_path") if training.visual_und else None,
            autoencoder=AutoencoderArch.beside(Path(model.vae_path)) if training.visual_gen else None,
            **settings,
        )
    if arch.vit is not None and "vit_patch_size" in config.given and model.vit_patch_size != arch.vit.patch_size:
        raise ValueError(f"--vit_patch_size is {model.vit_patch_size}, but the vision tower's patches have {arch.vit.patch_size} pixels")
    if cached_autoencoder is not None:
        arch = replace(arch, autoencoder=cached_autoencoder)
    return arch


def starting_folder(config: Config) -> Path | None:
    """Return the model folder whose weights the run starts from, or None if it starts from a checkpoint or from pretrained parts."""
    training = config.training
    if training.resume_from is None or not training.resume_model_only:
        return None
    folder = Path(training.resume_from)
    return folder if any_weight_file(folder, training.weights_name) is not None else None


def own_index(config: Config) -> Path:
    """Return the folder of the index that a run without ``--index_dir`` makes."""
    return Path(config.training.results_dir) / "index"


def tokenizer_path(config: Config) -> str:
    """Return the path of the tokenizer: tokenizer_path, or the model's folder if that is not given."""
    return config.model.tokenizer_path or (config.model.model_path if config.training.finetune_from_hf else config.model.llm_path)


def autoencoder_path(config: Config) -> Path:
    """Return the file of the autoencoder's weights. A run with a latent cache does not need it."""
    return Path(config.model.model_path) / "ae.safetensors" if config.training.finetune_from_hf else Path(config.model.vae_path)
