"""Every check that needs no data, before ranks exchange anything: each error names the flag, the reason and what to do."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import RECOMPUTE_MODULES, check_parallel_sizes
from megatron_bagel.config.parser import SECTIONS, Config
from megatron_bagel.config.resolve import architecture, resolve, tokenizer_path

_AT_LEAST_ONE = (
    "max_num_tokens_per_sample", "max_num_tokens", "expected_num_tokens", "prefetch_factor", "log_every", "save_every", "total_steps",
    "recompute_num_layers", "make_vocab_size_divisible_by",
    "eval_samples", "eval_answer_tokens", "eval_cfg_text_scale", "eval_cfg_img_scale",
    "max_bad_steps", "straggler_factor",
)  # fmt: skip
_NOT_NEGATIVE = (
    "num_workers", "decode_threads", "max_buffer_size", "warmup_steps", "lr", "min_lr", "eps", "max_grad_norm", "mse_weight", "ce_weight",
    "peak_device_tflops", "eval_every", "eval_pictures", "keep_last", "keep_every", "export_hf_every",
    "manual_gc_interval", "loss_spike_factor", "hang_timeout_minutes", "straggler_every", "save_local_every", "inprocess_restarts",
)  # fmt: skip
_PROBABILITIES = ("text_cond_dropout_prob", "vae_cond_dropout_prob", "vit_cond_dropout_prob", "ema")


def validate(config: Config, world_size: int, has_gpu: bool) -> None:
    """Raises ValueError for the first setting that cannot work, before this process has met another one.

    ``resolve`` and ``validate_architecture`` hold the checks of the layout and of the model that the settings describe.
    """
    validate_settings(config, world_size, has_gpu)
    check_paths(config)
    validate_architecture(config, architecture(config))


def validate_settings(config: Config, world_size: int, has_gpu: bool) -> None:
    """The checks that read no file."""
    refuse_unsupported_values(config)
    check_numbers(config)
    check_resilience(config)
    check_consistency(config)
    check_observing(config, world_size)
    resolve(config, world_size, has_gpu)


def refuse_unsupported_values(config: Config) -> None:
    """Values of the original's flags that cannot be honoured here; the reasons are also in docs/flags.md."""
    training = config.training
    if training.backward_prefetch != "BACKWARD_PRE":
        raise ValueError(
            f"--backward_prefetch {training.backward_prefetch} is not supported: weights are whole on every rank, so there is nothing to "
            "prefetch. Overlap of communication is set by --overlap_grad_reduce and --overlap_param_gather"
        )
    if training.cpu_offload:
        raise ValueError("--cpu_offload True is not supported: optimizer state is sharded over ranks instead (--use_distributed_optimizer)")
    if not training.freeze_vae:
        raise ValueError("--freeze_vae False is not supported: the autoencoder is never trained, and is not in the original either")
    if config.megatron.micro_batch_size != 1:
        raise ValueError(f"--micro_batch_size is {config.megatron.micro_batch_size}; a microbatch is one pack: raise --max_num_tokens")


def check_numbers(config: Config) -> None:
    """Ranges of single settings."""
    values = {name: value for section in SECTIONS for name, value in vars(getattr(config, section)).items()}
    for names, fits, text in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_PROBABILITIES, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for name in names:
            if not fits(values[name]):
                raise ValueError(f"--{name} is {values[name]}; it must be {text}")
    for name in ("beta1", "beta2"):
        if not 0 <= values[name] < 1:
            raise ValueError(f"--{name} is {values[name]}; it must be at least 0 and below 1")
    if values["distributed_timeout_minutes"] <= 0:
        raise ValueError(f"--distributed_timeout_minutes is {values['distributed_timeout_minutes']}; it must be positive")


def check_consistency(config: Config) -> None:
    """Settings that only make sense together."""
    data, training, megatron = config.data, config.training, config.megatron
    if data.max_num_tokens_per_sample > data.max_num_tokens and "max_num_tokens_per_sample" in config.given:
        raise ValueError(
            f"--max_num_tokens_per_sample {data.max_num_tokens_per_sample} is more than a pack holds "
            f"(--max_num_tokens {data.max_num_tokens}); lower it, or raise --max_num_tokens"
        )
    if training.expected_num_tokens > data.max_num_tokens and "expected_num_tokens" in config.given:
        raise ValueError(
            f"--expected_num_tokens {training.expected_num_tokens} is more than a pack holds (--max_num_tokens {data.max_num_tokens})"
        )
    if training.lr_scheduler == "cosine" and training.min_lr > training.lr:
        raise ValueError(f"--min_lr {training.min_lr} is above --lr {training.lr}")
    if megatron.overlap_param_gather and not (megatron.use_distributed_optimizer and megatron.overlap_grad_reduce):
        raise ValueError("--overlap_param_gather needs --use_distributed_optimizer and --overlap_grad_reduce")
    if (megatron.fake_world_size is not None or "fake_rank" in config.given) and not megatron.dry_run:
        raise ValueError("--fake_world_size and --fake_rank describe a rehearsal: add --dry_run, or drop them")
    if megatron.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        raise ValueError("--transformer_impl transformer_engine needs the package transformer-engine, which needs a GPU; use local")
    if megatron.manual_gc_interval and not megatron.manual_gc:
        raise ValueError(f"--manual_gc_interval {megatron.manual_gc_interval} needs --manual_gc: without it each rank collects by itself")
    check_recompute(config)
    check_parallel_consistency(megatron)
    if training.keep_every and not training.keep_last:
        raise ValueError(f"--keep_every {training.keep_every} needs --keep_last: without it no checkpoint is removed")
    if training.eval_every and not data.split:
        raise ValueError(f'--eval_every {training.eval_every} needs rows that are not trained on: give --split, such as "99,1"')
    if training.resume_model_only and training.resume_from is None:
        raise ValueError("--resume_model_only True needs --resume_from: the checkpoint or folder to take weights from")
    if training.finetune_from_ema and not training.resume_model_only:
        raise ValueError("--finetune_from_ema True needs --resume_model_only True: a full resume has both model and EMA")
    if training.finetune_from_hf and training.resume_from is None and not config.model.init_random:
        raise ValueError(
            "--finetune_from_hf True only gives architecture, tokenizer and autoencoder; weights come from --resume_from "
            f"(usually the same folder: --resume_from {config.model.model_path} --resume_model_only True). "
            "To train from random weights on purpose, add --init_random True"
        )


def check_resilience(config: Config) -> None:
    """Limits of the watchdog against those of the collectives, and the optional package."""
    resilience, collective = config.resilience, config.megatron.distributed_timeout_minutes
    if resilience.hang_timeout_minutes >= collective and "hang_timeout_minutes" in config.given:
        raise ValueError(
            f"--hang_timeout_minutes {resilience.hang_timeout_minutes} must be below --distributed_timeout_minutes {collective}: later "
            "the collectives give up first, and nobody names the rank they waited for"
        )
    if resilience.first_step_timeout_minutes < resilience.hang_timeout_minutes:
        raise ValueError(
            f"--first_step_timeout_minutes {resilience.first_step_timeout_minutes} is below --hang_timeout_minutes "
            f"{resilience.hang_timeout_minutes}; the first step takes longer than the others"
        )
    if 0 < resilience.loss_spike_factor <= 1:
        raise ValueError(f"--loss_spike_factor {resilience.loss_spike_factor} would call every step a spike; it must be above 1, or 0")
    grace = resilience.preemption_grace_seconds
    if grace is not None and grace <= 0:
        raise ValueError(f"--preemption_grace_seconds {grace:g} leaves no time to save; give the scheduler's, in seconds, or drop the flag")
    if (resilience.local_checkpoint_dir is None) != (resilience.save_local_every == 0):
        raise ValueError(
            "--local_checkpoint_dir and --save_local_every need each other: a folder on a disk of each node, and the steps between saves"
        )
    if resilience.ft_heartbeats:
        needs_resiliency_package("--ft_heartbeats True", "and start with its ft_launcher in place of torchrun")
    if resilience.local_checkpoint_dir is not None:
        needs_resiliency_package("--local_checkpoint_dir", "on every node")
    if resilience.inprocess_restarts:
        needs_resiliency_package("--inprocess_restarts", "on every node")
        if not config.training.auto_resume:
            raise ValueError("--inprocess_restarts needs --auto_resume True: a run that starts again continues from its newest checkpoint")


def needs_resiliency_package(flag: str, advice: str) -> None:
    """Raise ValueError where nvidia-resiliency-ext is not installed."""
    if find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            f"{flag} needs the package nvidia-resiliency-ext, which is not installed: pip install 'megatron-bagel[resiliency]' (Linux, "
            f"Python 3.10 and 3.11) {advice}; or leave the flag out"
        )


def check_recompute(config: Config) -> None:
    """Each granularity has flags of its own."""
    megatron = config.megatron
    if megatron.recompute_granularity != "full" and config.given & {"recompute_method", "recompute_num_layers"}:
        raise ValueError("--recompute_method and --recompute_num_layers need --recompute_granularity full")
    if megatron.recompute_modules and megatron.recompute_granularity != "selective":
        raise ValueError("--recompute_modules needs --recompute_granularity selective")
    unknown = [name for name in megatron.recompute_modules if name not in RECOMPUTE_MODULES]
    if unknown:
        raise ValueError(f"--recompute_modules {' '.join(unknown)}: choose from {', '.join(RECOMPUTE_MODULES)}")


def check_parallel_consistency(megatron: MegatronArguments) -> None:
    """Parallel settings that need each other, whatever the model."""
    if megatron.sequence_parallel and megatron.tensor_model_parallel_size == 1:
        raise ValueError("--sequence_parallel splits tokens over tensor-parallel ranks: it needs --tensor_model_parallel_size above 1")
    for name in ("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "num_layers_in_first_pipeline_stage",
                 "num_layers_in_last_pipeline_stage"):  # fmt: skip
        size = getattr(megatron, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name} is {size}; it must be at least 1")
        if size is not None and megatron.pipeline_model_parallel_size == 1:
            raise ValueError(f"--{name} {size} needs --pipeline_model_parallel_size above 1")
    if megatron.num_layers_per_virtual_pipeline_stage is not None and (
        megatron.num_layers_in_first_pipeline_stage is not None or megatron.num_layers_in_last_pipeline_stage is not None
    ):
        raise ValueError(
            "--num_layers_per_virtual_pipeline_stage needs equal stages; with --num_layers_in_first_pipeline_stage or "
            "--num_layers_in_last_pipeline_stage say --virtual_pipeline_model_parallel_size instead"
        )


def check_observing(config: Config, world_size: int) -> None:
    """The profiler's window and ranks, and the name of Prometheus' file."""
    observing = config.observing
    given = sorted(config.given & {"profile_step_start", "profile_step_end", "profile_ranks", "profile_shapes"})
    if given and not observing.profile:
        raise ValueError(f"--{given[0]} needs --profile: nothing is profiled without it")
    if observing.profile and not 0 <= observing.profile_step_start < observing.profile_step_end:
        raise ValueError(
            f"--profile_step_start {observing.profile_step_start} and --profile_step_end {observing.profile_step_end} leave no step to "
            "profile: the first must be 0 or more, and below the second"
        )
    unknown = [rank for rank in observing.profile_ranks if not 0 <= rank < world_size]
    if observing.profile and (unknown or not observing.profile_ranks):
        raise ValueError(f"--profile_ranks {' '.join(map(str, unknown))}: give ranks of this run, 0 to {world_size - 1}")
    if observing.prometheus_file is not None and not observing.prometheus_file.endswith(".prom"):
        raise ValueError(f"--prometheus_file {observing.prometheus_file}: node_exporter only reads files whose names end in .prom")


def check_paths(config: Config) -> None:
    """Every file and folder that is read at start-up exists."""
    model, data, training = config.model, config.data, config.training
    _need_file("dataset_config_file", data.dataset_config_file, "the YAML of dataset groups")
    if data.index_dir is not None:
        _need_folder("index_dir", data.index_dir, "an index written by data_tools/build_index.py")
    if data.data_root is not None and "://" not in data.data_root:
        _need_folder("data_root", data.data_root, "the raw data")
    if data.latent_cache is not None:
        _need_folder("latent_cache", data.latent_cache, "a cache made by data_tools/cache_latents.py")
        if training.vae_encode_padded:
            raise ValueError("--vae_encode_padded encodes images with their neighbours of a pack; it cannot be used with --latent_cache")
        if training.vae_encode_bf16:
            raise ValueError("--vae_encode_bf16 says how images are encoded, but --latent_cache holds them encoded: leave one of them out")
    if training.finetune_from_hf:
        _need_folder("model_path", model.model_path, "a folder in BAGEL's released layout")
        _need_file("model_path", Path(model.model_path) / "llm_config.json", "the decoder's configuration")
        if training.visual_und:
            _need_file("model_path", Path(model.model_path) / "vit_config.json", "the vision tower's configuration (or --visual_und False)")
        if training.visual_gen and data.latent_cache is None:
            _need_file("model_path", Path(model.model_path) / "ae.safetensors", "the autoencoder's weights (or --visual_gen False)")
    else:
        _need_folder("llm_path", model.llm_path, "a Qwen2 folder")
        _need_file("llm_path", Path(model.llm_path) / "config.json", "the decoder's configuration")
        if training.visual_und:
            _need_folder("vit_path", model.vit_path, "a SigLIP folder (or --visual_und False)")
            _need_file("vit_path", Path(model.vit_path) / "config.json", "the vision tower's configuration")
        if training.visual_gen and data.latent_cache is None:
            _need_file("vae_path", model.vae_path, "the autoencoder's weights (or --visual_gen False)")
    if training.resume_from is not None and not Path(training.resume_from).exists():
        raise ValueError(f"--resume_from {training.resume_from} does not exist; leave the flag out to start without it")
    if not Path(tokenizer_path(config)).exists():
        raise ValueError(f"--tokenizer_path {tokenizer_path(config)} does not exist; it should be a tokenizer folder or a .model file")


def validate_architecture(config: Config, arch: BagelArch) -> None:
    """Checks of the parallel layout and the loss weights against the model's sizes."""
    megatron, llm = config.megatron, arch.llm
    check_parallel_sizes(megatron, llm)
    if arch.vit is None and arch.autoencoder is None and not config.training.ce_weight:
        raise ValueError("--visual_gen False, --visual_und False and --ce_weight 0 leave nothing to train on")
    if megatron.recompute_granularity == "full" and megatron.recompute_num_layers > llm.num_hidden_layers:
        raise ValueError(f"--recompute_num_layers {megatron.recompute_num_layers} is more than the decoder's {llm.num_hidden_layers}")


def _need_file(name: str, path: str | Path, what: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"--{name}: there is no file {path}; it should be {what}")


def _need_folder(name: str, path: str | Path, what: str) -> None:
    if not Path(path).is_dir():
        raise ValueError(f"--{name}: there is no folder {path}; it should be {what}")
