#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pre-trains a BAGEL of 1.4 billion parameters from Qwen2.5-0.5B, SigLIP and FLUX's autoencoder: the guide's first command.
#
#   dataset_config_file=data.yaml output_path=results/0.5b bash examples/pretrain_qwen2.5_0.5b.sh [flags of megatron_bagel.train]
#
# examples/launch.sh has the variables for several nodes, and DRY_RUN=1. Flags given here come last and win. Not yet run on a GPU.
set -euo pipefail
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

dataset_config_file=${dataset_config_file:-$repository/data/configs/example.yaml}
llm_path=${llm_path:-hf/Qwen2.5-0.5B-Instruct}
vit_path=${vit_path:-hf/siglip-so400m-14-980-flash-attn2-navit}
vae_path=${vae_path:-flux/vae/ae.safetensors}
output_path=${output_path:-results/pretrain_qwen2.5_0.5b}
ckpt_path=${ckpt_path:-$output_path/checkpoints}

flags=(
  # The guide's command.
  --dataset_config_file "$dataset_config_file"
  --llm_path "$llm_path" --vae_path "$vae_path" --vit_path "$vit_path"
  --layer_module Qwen2MoTDecoderLayer --use_flex True
  --results_dir "$output_path" --checkpoint_dir "$ckpt_path"
  # 32 for low-resolution pre-training: it must cover max_image_size of the YAML, divided by 16.
  --max_latent_size 64
  # A run that was stopped goes on; resume_from names where the very first start takes its weights, if not from llm_path.
  --auto_resume True

  # Layout: data-parallel only. Weights and gradients take 7.8 GiB on every GPU, optimizer and average 20.8 GiB divided by the number of
  # GPUs (docs/parallelism.md), so nothing has to be split; splitting a hidden size of 896 would leave matrices too small for a GPU.
  --overlap_grad_reduce --overlap_param_gather
  # Activations of a pack of 36,864 tokens do not fit beside that: keep the inputs of layers only, as the original does.
  --recompute_granularity full --recompute_vit True

  # At the original's epsilon of 1e-15, weights without a true gradient (the ViT's key biases) take full steps on rounding noise, so runs
  # on other layouts drift apart there; 1e-8 is AdamW's usual value.
  --eps 1e-8

  # Files of a save are written while training goes on; three checkpoints stay, and every 10,000th step for good.
  --async_save True --save_every 2000 --keep_last 3 --keep_every 10000
)
# An index that was built beforehand (data_tools/build_index.py) saves every GPU the wait for rank 0.
if [[ -n ${index_dir:-} ]]; then flags+=(--index_dir "$index_dir"); fi
if [[ -n ${resume_from:-} ]]; then flags+=(--resume_from "$resume_from"); fi

launch "${flags[@]}" "$@"
