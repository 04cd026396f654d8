# SPDX-License-Identifier: Apache-2.0
"""What flags come to on a number of ranks, and which combinations are refused with the sizes that work."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.config.parser import parse_config
from megatron_bagel.config.resolve import ResolvedSizes, architecture, data_parallel_size, resolve, tokenizer_path


def layout(words: str, world_size: int = 1, has_gpu: bool = False) -> ResolvedSizes:
    return resolve(parse_config(words.split()), world_size, has_gpu)


def test_defaults_on_a_laptop():
    made = layout("")
    assert (made.global_batch_size, made.num_microbatches, made.data_parallel_size) == (1, 1, 1)
    assert made.attention_backend == "sdpa" and not made.bf16 and made.use_distributed_optimizer and not made.use_wandb
    assert made.distributed_optimizer_instances == 1
    assert layout("", 2, has_gpu=True).bf16 and layout("--bf16 False", has_gpu=True).bf16 is False


@given(st.integers(1, 6), st.integers(1, 6))
def test_accumulation_and_global_batch_are_two_views_of_one_setting(replicas, accumulation):
    by_accumulation = layout(f"--gradient_accumulation_steps {accumulation}", replicas)
    by_size = layout(f"--global-batch-size {replicas * accumulation}", replicas)
    assert by_accumulation == by_size
    assert by_size.num_microbatches * replicas == by_size.global_batch_size


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        ("--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2", 6, r"= 4 ranks per replica .* 6 ranks.* 1, 2, 3 or 6"),
        ("--context_parallel_size 0", 1, r"--context_parallel_size is 0"),
        ("--global_batch_size 7", 2, r"not a multiple of the 2 .* 8 would be"),
        ("--global_batch_size 8 --gradient_accumulation_steps 2", 2, r"is 4 packs per replica, but --gradient_accumulation_steps says 2"),
        ("--gradient_accumulation_steps 0", 1, r"at least 1"),
        ("--global_batch_size 8 --rampup_batch_size 2 2", 1, r"expected three numbers"),
        ("--global_batch_size 8 --rampup_batch_size 2 4 40", 2, r"which is 8; 10 would do"),
        ("--global_batch_size 8 --rampup_batch_size 2 1 40", 2, r"batches of 3, 5 or 7 packs are not multiples of the 2"),
        (
            "--global_batch_size 8 --rampup_batch_size 1 1 40 --pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2",
            2,
            r"1 packs per replica and step do not divide into groups of 2",
        ),
        ("--sharding_strategy SHARD_HALF", 1, r"SHARD_HALF' is none of FULL_SHARD"),
        ("--sharding_strategy NO_SHARD --use_distributed_optimizer", 1, r"contradict"),
        ("--sharding_strategy FULL_SHARD --num_replicate 2", 2, r"only means something with --sharding_strategy HYBRID_SHARD"),
        ("--num_replicate 3", 4, r"do not divide the 4 data-parallel ranks; 1, 2 or 4 would"),
        ("--num_shard 8", 1, r"--num_shard 8 x --num_replicate 1 = 8, but there are 1 .*; give --num_shard 1"),
        ("--num_shard 4 --num_replicate 2", 4, r"give --num_shard 2"),
        ("--num_replicate 2 --num_distributed_optimizer_instances 4", 4, r"are one setting"),
        ("--num_replicate 2 --use_distributed_optimizer False", 2, r"needs --use_distributed_optimizer True"),
        ("--use_flex False --attention_backend flex", 1, r"contradict"),
        ("--attention_backend flex", 1, r"no backward pass on CPU"),
        ("--attention_backend flex_flash", 1, r"flex_flash needs a GPU: .* no backward pass on CPU"),
    ],
)
def test_refused(words, world_size, message):
    with pytest.raises(ValueError, match=message):
        layout(words, world_size)


def test_fsdp_names_become_optimizer_settings():
    assert layout("--num_replicate 2", 4).distributed_optimizer_instances == 2
    assert layout("--num_shard 2 --num_replicate 2 --sharding_strategy HYBRID_SHARD", 4).distributed_optimizer_instances == 2
    assert layout("--num-distributed-optimizer-instances 2", 4) == layout("--num_replicate 2", 4)
    assert not layout("--sharding_strategy NO_SHARD", 2).use_distributed_optimizer


@pytest.mark.parametrize(
    ("words", "has_gpu", "backend"),
    [
        ("", True, "flex"), ("--use_flex True", True, "flex"), ("--use_flex False", True, "sdpa"),
        ("--attention_backend sdpa", True, "sdpa"), ("--attention_backend flex_flash --use_flex True", True, "flex_flash"),
        ("", False, "sdpa"), ("--use_flex True", False, "sdpa"), ("--attention_backend dense", False, "dense"),
    ],
)  # fmt: skip
def test_attention_backend(words, has_gpu, backend):
    made = layout(words, has_gpu=has_gpu)
    assert made.attention_backend == backend
    assert any("use_flex" in note for note in made.notes) == (words == "--use_flex True" and not has_gpu)


def test_flags_without_a_counterpart_are_said_at_start_up():
    assert any("prefer_buffer_before" in note for note in layout("--prefer_buffer_before 100").notes)


def test_wandb_is_on_when_one_of_its_flags_is_given():
    assert layout("--wandb_offline True").use_wandb and not layout("--wandb_name x --use_wandb False").use_wandb


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_data_parallel_size_is_what_the_other_axes_leave(tp, pp, cp, dp):
    words = f"--tensor_model_parallel_size {tp} --pipeline_model_parallel_size {pp} --context_parallel_size {cp}"
    assert data_parallel_size(parse_config(words.split()), tp * pp * cp * dp) == dp


def test_architecture_of_a_released_folder(goldens):
    folder = goldens / "hf"
    base = f"--finetune_from_hf True --model_path {folder}"
    arch = architecture(parse_config(base.split()))
    # The folder states its sizes; the flags' defaults (32 and 70) do not override it, given flags do.
    assert (arch.max_latent_size, arch.vit_max_num_patch_per_side, arch.llm.qk_norm) == (16, 16, True)
    changed = architecture(parse_config(f"{base} --max_latent_size 32 --layer_module Qwen2MoEDecoderLayer --visual_und False".split()))
    assert (changed.max_latent_size, changed.llm.layer_module, changed.vit) == (32, "Qwen2MoEDecoderLayer", None)
    assert architecture(parse_config(f"{base} --visual_gen False".split())).autoencoder is None
    with pytest.raises(ValueError, match=r"set --vit_max_num_patch_per_side 16"):
        architecture(parse_config(f"{base} --vit_max_num_patch_per_side 70".split()))
    with pytest.raises(ValueError, match=r"--vit_patch_size is 16, .* 14 pixels"):
        architecture(parse_config(f"{base} --vit_patch_size 16".split()))


def test_architecture_of_a_trained_folder_without_configs(goldens, tmp_path):
    trained, llm = tmp_path / "0002000", tmp_path / "llm"
    trained.mkdir()
    llm.mkdir()
    (trained / "ema_bf16.safetensors").symlink_to(goldens / "hf/ema.safetensors")
    config = json.loads((goldens / "hf/llm_config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    base = f"--llm_path {llm} --visual_und False --visual_gen False"
    assert architecture(parse_config(base.split())).llm.vocab_size == 600
    start = f"{base} --resume_from {trained} --resume_model_only True --weights_name ema_bf16.safetensors"
    assert architecture(parse_config(start.split())).llm.vocab_size == 544
    with pytest.raises(ValueError, match=r"--weights_name x\.safetensors: .*other files of weights: ema_bf16"):
        architecture(parse_config(start.replace("ema_bf16", "x").split()))


def test_architecture_of_parts(tmp_path):
    llm = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    vit = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 112}
    for name, content in (("llm", llm), ("vit", vit)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "ae_config.json").write_text(json.dumps({"ch": 32, "ch_mult": [1, 2, 2]}))
    base = f"--llm_path {tmp_path}/llm --vit_path {tmp_path}/vit --vae_path {tmp_path}/ae.safetensors --vit_max_num_patch_per_side 8"
    arch = architecture(parse_config(f"{base} --timestep_shift 3".split()))
    assert arch.llm.has_gen_attention and arch.llm.qk_norm and arch.n_vit_layers == 2 and arch.timestep_shift == 3
    assert arch.autoencoder.downsample == 4 and arch.vae_token_pixels == 8 and arch.latent_token_dim == 64
    plain = architecture(parse_config(f"{base} --llm_qk_norm False --layer_module Qwen2DecoderLayer --visual_und False".split()))
    assert not plain.llm.qk_norm and not plain.llm.has_gen_mlp and plain.vit is None
    with pytest.raises(ValueError, match=r"--llm_path: there is no file /nowhere/config.json"):
        architecture(parse_config(["--llm_path", "/nowhere"]))


def test_default_places():
    config = parse_config(["--llm_path", "L", "--model_path", "M"])
    assert tokenizer_path(config) == "L"
    assert tokenizer_path(parse_config(["--model_path", "M", "--finetune_from_hf", "True"])) == "M"
    assert tokenizer_path(parse_config(["--tokenizer_path", "T"])) == "T"
