#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the small world on one process, with tensor parallelism over two and with pipeline parallelism over two, and compares the losses;
# then exports the first run as a Hugging Face folder and fine-tunes from it: held-out losses must go on where they were.
#
#   bash examples/small_world/layouts.sh OUTPUT_FOLDER [flags of megatron_bagel.train, such as --total_steps 200]
#
# OUTPUT_FOLDER is one that run.sh has made: its data, index and latents are used, and what is trained here goes to OUTPUT_FOLDER/layouts.
set -euo pipefail
# torch warns of an old package at every import, the launcher's included, which only the environment reaches.
export PYTHONWARNINGS="ignore:The pynvml package is deprecated:FutureWarning${PYTHONWARNINGS:+,$PYTHONWARNINGS}"

if [ $# -lt 1 ] || [[ $1 == --* ]]; then
  echo "usage: bash examples/small_world/layouts.sh OUTPUT_FOLDER [flags of megatron_bagel.train]" >&2
  exit 2
fi
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
HERE=examples/small_world
AUTOENCODER=megatron_bagel/sample_world/assets/vae/ae.safetensors

train() { # NAME PROCESSES FLAGS...
  local to=$OUT/layouts/$1 processes=$2
  shift 2
  "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m megatron_bagel.train --config $HERE/config.yaml \
    --dataset_config_file "$OUT/data/dataset.yaml" --index_dir "$OUT/index" --latent_cache "$OUT/latents" \
    --results_dir "$to/results" --checkpoint_dir "$to/checkpoints" --global_batch_size 2 --eval_every 0 --eval_pictures 0 --log_every 1 --auto_resume True "$@"
}
MODEL=(--llm_path "$OUT/data/llm" --vit_path "$OUT/data/vit" --vae_path "$AUTOENCODER")

train one 1 "${MODEL[@]}" "$@" --eval_every 1000000
train tp2 2 "${MODEL[@]}" --tensor_model_parallel_size 2 --sequence_parallel True "$@"
train pp2 2 "${MODEL[@]}" --pipeline_model_parallel_size 2 "$@"

LAST=$(find "$OUT/layouts/one/checkpoints" -maxdepth 1 -name '[0-9]*' | sort | tail -n 1)
if [ ! -d "$OUT/layouts/hf" ]; then
  "$PYTHON" tools/checkpoint_convert/megatron_to_hf.py --checkpoint "$LAST" --output "$OUT/layouts/hf" --weights model --dtype fp32
fi
# One step from the folder, at the very beginning of a warm-up: held-out losses must be those that the run ended with.
train tuned 1 --finetune_from_hf True --model_path "$OUT/layouts/hf" --resume_from "$OUT/layouts/hf" --resume_model_only True \
  --init_random False "$@" --total_steps 1 --eval_every 1 --lr_scheduler constant --warmup_steps 1000

"$PYTHON" $HERE/losses.py "$OUT"/layouts/{one,tp2,pp2} --continued "$OUT/layouts/tuned"
