# SPDX-License-Identifier: Apache-2.0
"""The check that every file and folder exists which a run reads at start-up."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.common.hub_names import hub_hint
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import tokenizer_path


def check_paths(config: Config) -> None:
    """Check that every file and folder exists which a run reads at start-up. Raises ValueError with flag and path."""
    model, data, training = config.model, config.data, config.training
    _need_file("dataset_config_file", data.dataset_config_file, "the YAML of dataset groups")
    _check_index_cache(config)
    if data.index_dir is not None and "://" not in data.index_dir:
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
        _need_folder("model_path", model.model_path, "a folder in BAGEL's released format")
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
        hint = hub_hint(training.resume_from)
        raise ValueError(f"--resume_from {training.resume_from} does not exist; leave the flag out to start without it{hint}")
    if config.lora.lora_rank is not None and training.resume_from is None:
        raise ValueError(
            "--lora_rank trains adapters of given weights: give the folder or checkpoint that holds all of them with --resume_from and "
            "--resume_model_only True (megatron-bagel convert init makes one of pretrained parts)"
        )
    if not Path(tokenizer_path(config)).exists():
        raise ValueError(f"--tokenizer_path {tokenizer_path(config)} does not exist; it should be a tokenizer folder or a .model file")


def _check_index_cache(config: Config) -> None:
    data = config.data
    is_remote = data.index_dir is not None and "://" in data.index_dir
    if is_remote and data.index_cache_dir is None:
        raise ValueError(
            f"--index_dir {data.index_dir} is a URL: give a folder on a disk of each machine, which keeps the shards in use, with "
            "--index_cache_dir"
        )
    for name in ("index_cache_dir", "index_cache_bytes"):
        if not is_remote and getattr(data, name) is not None:
            raise ValueError(f"--{name} is for an index in an object store: give its URL with --index_dir, or leave the flag out")


def _need_file(name: str, path: str | Path, content: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"--{name}: there is no file {path}; it should be {content}")


def _need_folder(name: str, path: str | Path, content: str) -> None:
    if not Path(path).is_dir():
        raise ValueError(f"--{name}: there is no folder {path}; it should be {content}{hub_hint(str(path))}")
