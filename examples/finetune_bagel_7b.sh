#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fine-tunes the released BAGEL-7B-MoT: the guide's second command, spread so that it fits 8 GPUs of 80 GB.
#
#   model_path=hf/BAGEL-7B-MoT dataset_config_file=data.yaml bash examples/finetune_bagel_7b.sh [flags of megatron_bagel.train]
#
# Only pictures to draw in the data: add --visual_und False; only questions: --visual_gen False. examples/launch.sh has the variables
# for several nodes, and DRY_RUN=1. Flags given here come last and win. Not yet run on a GPU.
set -euo pipefail
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

dataset_config_file=${dataset_config_file:-$repository/data/configs/example.yaml}
model_path=${model_path:-hf/BAGEL-7B-MoT}
output_path=${output_path:-results/finetune_bagel_7b}
ckpt_path=${ckpt_path:-$output_path/checkpoints}

# By memory, as in pretrain_qwen2.5_7b.sh: on one node 4 ranks per replica take 49.7 GiB and leave the rest to activations; from 4 nodes on the
# optimizer is spread so far that 2 ranks do (49.0 GiB per GPU), and there are twice as many replicas.
tensor_parallel=${tensor_parallel:-$((num_nodes < 4 ? 4 : 2))}

flags=(
  # The guide's command.
  --dataset_config_file "$dataset_config_file"
  --model_path "$model_path" --layer_module Qwen2MoTDecoderLayer --max_latent_size 64
  --resume-from "$model_path" --finetune_from_hf True --auto_resume True --resume-model-only True --finetune-from-ema True
  --log_every 1 --lr 2e-5 --num_worker 1
  --expected_num_tokens 10240 --max_num_tokens 11520 --max_num_tokens_per_sample 10240
  --results_dir "$output_path" --checkpoint_dir "$ckpt_path"

  --tensor_model_parallel_size "$tensor_parallel" --sequence_parallel
  --overlap_grad_reduce --overlap_param_gather
  # The original always recomputes. Packs of 11,520 tokens are short: where memory is left, selective is faster.
  --recompute_granularity full --recompute_vit True

  # At the original's epsilon of 1e-15, weights without a true gradient (the ViT's key biases) take full steps on rounding noise, so runs
  # on other layouts drift apart there; 1e-8 is AdamW's usual value.
  --eps 1e-8

  --async_save True --save_every 500 --keep_last 2
)
if [[ -n ${index_dir:-} ]]; then flags+=(--index_dir "$index_dir"); fi

launch "${flags[@]}" "$@"
