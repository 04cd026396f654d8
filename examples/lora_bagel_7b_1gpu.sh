#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains adapters of the released BAGEL-7B-MoT on one GPU of 80 GB. The plan predicts 39.4 GiB for full packs of 11,520 tokens.
#
#   model_path=hf/BAGEL-7B-MoT dataset_config_file=data.yaml bash examples/lora_bagel_7b_1gpu.sh [flags of megatron_bagel.train]
#
# Only pictures to draw in the data: add --lora_experts gen --freeze_und True. Flags given here come last and win. Not yet run on a GPU.
set -euo pipefail
nproc_per_node=${nproc_per_node:-1}
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

dataset_config_file=${dataset_config_file:-$repository/data/configs/example.yaml}
model_path=${model_path:-hf/BAGEL-7B-MoT}
output_path=${output_path:-results/lora_bagel_7b}
ckpt_path=${ckpt_path:-$output_path/checkpoints}

flags=(
  --dataset_config_file "$dataset_config_file"
  --model_path "$model_path" --layer_module Qwen2MoTDecoderLayer --max_latent_size 64
  --resume-from "$model_path" --finetune_from_hf True --auto_resume True --resume-model-only True --finetune-from-ema True
  --expected_num_tokens 10240 --max_num_tokens 11520 --max_num_tokens_per_sample 10240 --num_workers 4
  --results_dir "$output_path" --checkpoint_dir "$ckpt_path"

  # 323 million of 14.9 billion weights train. The base stays in bf16, once: no gradient, no optimizer state, no average of it.
  --lora_rank 64 --lora_alpha 64
  # About ten times the rate of full fine-tuning: B starts at zero, and a small rank averages over many gradients.
  --lr 1e-4 --warmup_steps 50 --total_steps 2000
  # One pack is a small batch. Four packs take no more memory, and steps are four times as long.
  --gradient_accumulation_steps "${gradient_accumulation_steps:-4}"
  # Without it the activations of a pack take 53 GiB.
  --recompute_granularity full
  # The average of 0.9999 looks back 10,000 steps, five times the run; this one looks back 500.
  --ema 0.998
  # The original's 1e-15 lets weights whose gradient is zero but for rounding take full steps; 1e-8 is AdamW's usual value.
  --eps 1e-8

  # The losses of the starting weights come before the first step, so that it shows whether training helps.
  --split '99,1' --eval_every 200 --eval_at_start True
  --log_every 1 --save_every 200 --keep_last 3
)
if [[ -n ${index_dir:-} ]]; then flags+=(--index_dir "$index_dir"); fi

launch "${flags[@]}" "$@"
