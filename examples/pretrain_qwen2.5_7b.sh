#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pre-trains a BAGEL of 14.6 billion parameters (7 billion active) from Qwen2.5-7B, SigLIP and FLUX's autoencoder.
#
#   num_nodes=8 master_addr=node0 dataset_config_file=data.yaml index_dir=index bash examples/pretrain_qwen2.5_7b.sh [flags]
#
# the same line on every node; examples/launch.sh has the variables, and DRY_RUN=1. Flags given here come last and win. Written for
# nodes of 8 GPUs of 80 GB; not yet run on a GPU.
set -euo pipefail
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

dataset_config_file=${dataset_config_file:-$repository/data/configs/example.yaml}
llm_path=${llm_path:-hf/Qwen2.5-7B-Instruct}
vit_path=${vit_path:-hf/siglip-so400m-14-980-flash-attn2-navit}
vae_path=${vae_path:-flux/vae/ae.safetensors}
output_path=${output_path:-results/pretrain_qwen2.5_7b}
ckpt_path=${ckpt_path:-$output_path/checkpoints}

# Tensor parallelism stays inside a node, whose links are fast, and 4 is the most that Qwen2.5's 4 key/value heads allow without sharing.
# It is chosen by memory: per GPU, without activations, 49.7 GiB on 8 GPUs and 25.9 GiB on 64 with 4 ranks, 69.4 and 45.6 GiB with 2
# (docs/parallelism.md). From 8 nodes on, 2 leaves room and sends half as much per layer; 1 does not fit at any number.
tensor_parallel=${tensor_parallel:-$((num_nodes < 8 ? 4 : 2))}

flags=(
  # The guide's command for this size.
  --dataset_config_file "$dataset_config_file"
  --llm_path "$llm_path" --vae_path "$vae_path" --vit_path "$vit_path"
  --layer_module Qwen2MoTDecoderLayer --use_flex True
  --results_dir "$output_path" --checkpoint_dir "$ckpt_path"
  --max_latent_size 64
  --auto_resume True

  # Sequence parallelism costs no traffic beside tensor parallelism and divides what is left of the activations.
  --tensor_model_parallel_size "$tensor_parallel" --sequence_parallel
  # No pipeline: it needs many packs per replica and step to hide its bubble, and nothing here asks for it.
  # No context parallelism: a pack of 36,864 tokens fits. For packs several times longer add --context_parallel_size 2.
  --overlap_grad_reduce --overlap_param_gather
  # Layer inputs of a pack are 7 GiB over the tensor-parallel ranks; everything else is computed again.
  --recompute_granularity full --recompute_vit True

  # 64 GPUs are 32 replicas of 2, so a step is 32 packs of at most 36,864 tokens. More per step: --global_batch_size PACKS.
  --lr 1e-4 --warmup_steps 2000

  # At the original's epsilon of 1e-15, weights without a true gradient (the ViT's key biases) take full steps on rounding noise, so runs
  # on other layouts drift apart there; 1e-8 is AdamW's usual value.
  --eps 1e-8

  --async_save True --save_every 1000 --keep_last 3 --keep_every 10000
)
if [[ -n ${index_dir:-} ]]; then flags+=(--index_dir "$index_dir"); fi
if [[ -n ${resume_from:-} ]]; then flags+=(--resume_from "$resume_from"); fi

launch "${flags[@]}" "$@"
