# SPDX-License-Identifier: Apache-2.0
"""Each refusal at start-up names the flag, and a correct command passes all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bagel.config.architecture import BagelArch, LLMArch
from megatron_bagel.config.parser import parse_config
from megatron_bagel.config.validate import validate, validate_architecture


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A command whose files all exist."""
    llm = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    vit = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 980}
    for name, content in (("llm", llm), ("vit", vit), ("index", {}), ("released", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    for name, content in (("llm", llm), ("vit", vit)):
        (tmp_path / f"released/{name}_config.json").write_text(json.dumps(content))
    for name in ("ae.safetensors", "data.yaml", "released/ae.safetensors"):
        (tmp_path / name).write_text("{}")
    parts = f"--llm_path {tmp_path}/llm --vit_path {tmp_path}/vit --vae_path {tmp_path}/ae.safetensors --model_path {tmp_path}/released"
    return f"{parts} --dataset_config_file {tmp_path}/data.yaml --index_dir {tmp_path}/index"


def check(words: str, world_size: int = 1) -> None:
    validate(parse_config(words.split()), world_size, has_gpu=False)


@pytest.mark.parametrize(
    "words",
    [
        "", "--visual_und False --vit_path /nowhere", "--visual_gen False --vae_path /nowhere", "--num_workers 0", "--max_grad_norm 0",
        "--overlap_grad_reduce", "--overlap_grad_reduce --overlap_param_gather", "--recompute_granularity full --recompute_num_layers 2",
        "--finetune_from_hf True --init_random True --llm_path /nowhere", "--max_num_tokens 1000",
        "--overlap_vae_encode True",
        "--profile --profile_step_start 0 --profile_step_end 1 --prometheus_file bagel.prom",
    ],
)  # fmt: skip
def test_accepted(base, words):
    check(f"{base} {words}")


def test_the_guides_fine_tuning_settings_are_accepted(base, tmp_path):
    released = f"{tmp_path}/released"
    check(f"{base} --resume-from {released} --finetune_from_hf True --auto_resume True --resume-model-only True --finetune-from-ema True")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--backward_prefetch NO_PREFETCH", r"--backward_prefetch NO_PREFETCH .*nothing to prefetch.*--overlap_grad_reduce"),
        ("--cpu_offload True", r"--cpu_offload True"),
        ("--freeze_vae False", r"--freeze_vae False .*never trained"),
        ("--preemption_grace_seconds 0", r"--preemption_grace_seconds is 0.0; it must be positive"),
        ("--save_local_every 10", r"--local_checkpoint_dir and --save_local_every need each other"),
        ("--local_checkpoint_dir /tmp/local", r"--local_checkpoint_dir and --save_local_every need each other"),
        ("--local_checkpoint_dir /tmp/local --save_local_every -1", r"--save_local_every"),
        ("--micro_batch_size 2", r"a microbatch is one pack"),
        ("--sequence_parallel", r"--sequence_parallel .*needs --tensor_model_parallel_size above 1"),
        ("--virtual_pipeline_model_parallel_size 2", r"needs --pipeline_model_parallel_size above 1"),
        ("--num_layers_in_first_pipeline_stage 2", r"needs --pipeline_model_parallel_size above 1"),
        ("--profile_ranks 0", r"--profile_ranks needs --profile"),
        ("--profile --profile_step_start 5 --profile_step_end 5", r"leave no step to profile"),
        ("--profile --profile_ranks 0 64", r"--profile_ranks 64: give ranks of this run, 0 to"),
        ("--prometheus_file metrics.txt", r"names end in .prom"),
        ("--recompute_modules mlp", r"needs --recompute_granularity selective"),
        ("--recompute_granularity selective --recompute_modules moe", r"choose from core_attn, mlp"),
        ("--recompute_num_layers 2", r"need --recompute_granularity full"),
        ("--lr nan", r"--lr is nan; it must be 0 or more"),
        ("--eval_timesteps 1", r"--eval_timesteps is 1; it must be at least 2"),
        ("--lr -1", r"--lr is -1.0; it must be 0 or more"),
        ("--total_steps 0", r"--total_steps is 0; it must be at least 1"),
        ("--text_cond_dropout_prob 1.5", r"between 0 and 1"),
        ("--ema 2", r"--ema is 2.0"),
        ("--beta2 1", r"--beta2 is 1.0; it must be at least 0 and below 1"),
        ("--tensor_model_parallel_size 0", r"--tensor_model_parallel_size is 0; it must be at least 1"),
        ("--sharding_strategy ZERO", r"--sharding_strategy ZERO: choose from FULL_SHARD, "),
        ("--distributed_timeout_minutes 0", r"must be positive"),
        ("--max_num_tokens 100 --max_num_tokens_per_sample 200", r"--max_num_tokens_per_sample 200 is more than a pack holds"),
        ("--max_num_tokens 100 --expected_num_tokens 200", r"--expected_num_tokens 200 is more"),
        ("--lr_scheduler cosine --lr 1e-8", r"--min_lr 1e-07 is above --lr 1e-08"),
        ("--overlap_grad_reduce --overlap_param_gather --sharding_strategy NO_SHARD", r"needs --use_distributed_optimizer, not NO_SHARD"),
        ("--context_parallel_size 2 --cp_comm_type a2a --tensor_model_parallel_size 4", r"= 8 ranks per replica"),
        ("--pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2 --global_batch_size 2", r"2 layers cannot be divided"),
        ("--make_vocab_size_divisible_by 0", r"at least 1"),
        ("--overlap_vae_encode True --visual_gen False", r"--overlap_vae_encode True has nothing to encode: --visual_gen False"),
        ("--overlap_vae_encode True --latent_cache latents", r"--overlap_vae_encode True has nothing to encode: --latent_cache"),
        ("--overlap_param_gather", r"needs --use_distributed_optimizer and --overlap_grad_reduce"),
        ("--resume_model_only True", r"needs --resume_from"),
        ("--finetune_from_ema True", r"needs --resume_model_only"),
        ("--weights_name ema_bf16.safetensors", r"--weights_name ema_bf16.safetensors .* needs --resume_model_only True"),
        ("--finetune_from_hf True", r"weights come from --resume_from"),
        ("--dataset_config_file /nowhere.yaml", r"--dataset_config_file: there is no file /nowhere.yaml"),
        ("--index_dir /nowhere", r"--index_dir: there is no folder"),
        ("--data_root /nowhere", r"--data_root: there is no folder"),
        ("--llm_path /nowhere", r"--llm_path: there is no folder /nowhere"),
        ("--vit_path /nowhere", r"--vit_path: there is no folder .*or --visual_und False"),
        ("--vae_path /nowhere", r"--vae_path: there is no file"),
        ("--resume_from /nowhere", r"--resume_from /nowhere does not exist"),
        ("--tokenizer_path /nowhere", r"--tokenizer_path /nowhere does not exist"),
        ("--finetune_from_hf True --init_random True --model_path /nowhere", r"--model_path: there is no folder"),
        ("--global_batch_size 3", r"not a multiple of the 2"),
    ],
)
def test_refused(base, words, message):
    with pytest.raises(ValueError, match=message):
        check(f"{base} {words}", world_size=2)


def test_sizes_the_model_cannot_be_cut_into_are_refused_at_once(base):
    with pytest.raises(ValueError, match="--tensor_model_parallel_size 3: the model's 4 attention heads"):
        check(f"{base} --tensor_model_parallel_size 3", world_size=3)
    with pytest.raises(ValueError, match="--cp_comm_type a2a .*sizes that work: 1"):
        check(f"{base} --tensor_model_parallel_size 4 --context_parallel_size 2 --cp_comm_type a2a", world_size=8)


@pytest.mark.parametrize("missing", ["llm_config.json", "vit_config.json", "ae.safetensors"])
def test_incomplete_released_folder(base, tmp_path, missing):
    (tmp_path / "released" / missing).unlink()
    with pytest.raises(ValueError, match=rf"--model_path: there is no file .*{missing}"):
        check(f"{base} --finetune_from_hf True --resume_from {tmp_path}/released")


def test_against_the_model():
    arch = BagelArch(LLMArch(32, 48, 2, 4, 2, 64))
    validate_architecture(parse_config([]), arch)
    with pytest.raises(ValueError, match="leave nothing to train on"):
        validate_architecture(parse_config(["--ce_weight", "0"]), arch)
    with pytest.raises(ValueError, match="more than the decoder's 2"):
        validate_architecture(parse_config(["--recompute_granularity", "full", "--recompute_num_layers", "3"]), arch)
