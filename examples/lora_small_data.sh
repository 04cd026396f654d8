#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains adapters of the released BAGEL-7B-MoT on little data: 100, 1000 or 10000 samples. The numbers are starting points, not results.
#
#   samples=1000 model_path=hf/BAGEL-7B-MoT dataset_config_file=data.yaml bash examples/lora_small_data.sh [flags of megatron_bagel.train]
#
# docs/fine_tuning.md has the reasons. Flags given here come last and win. Not yet run on a GPU.
set -euo pipefail
case ${samples:-1000} in
  # A style or an object: few weights, few steps, a tenth held out, and dropout against learning by heart.
  100) flags=(--lora_rank 8 --lora_alpha 8 --lora_dropout 0.1 --lr 1e-4 --total_steps 200 --warmup_steps 10 --ema 0.98
    --split '90,10' --eval_every 20 --save_every 20) ;;
  1000) flags=(--lora_rank 16 --lora_alpha 16 --lora_dropout 0.05 --lr 1e-4 --total_steps 600 --warmup_steps 30 --ema 0.99
    --split '95,5' --eval_every 60 --save_every 60) ;;
  # Enough to teach a task: more weights, and no dropout.
  10000) flags=(--lora_rank 64 --lora_alpha 64 --lr 1e-4 --total_steps 3000 --warmup_steps 100 --ema 0.998
    --split '99,1' --eval_every 200 --save_every 200) ;;
  *)
    echo "samples=$samples is none of 100, 1000 and 10000: take the nearest" >&2
    exit 2
    ;;
esac
output_path=${output_path:-results/lora_small_data} exec bash "$(dirname "${BASH_SOURCE[0]}")/lora_bagel_7b_1gpu.sh" "${flags[@]}" --keep_last 0 "$@"
