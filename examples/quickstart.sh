#!/usr/bin/env bash
# From nothing to pictures on a laptop: installs, makes a small world of data, trains a small BAGEL on 2 processes (or one GPU), and asks it.
#
#   bash examples/quickstart.sh [OUTPUT_FOLDER] [flags of megatron_bagel.train, such as --total_steps 2000]
#
# A second run reuses every stage that is complete; remove a folder inside OUTPUT_FOLDER to do its stage again. Training goes on
# from its last checkpoint. PYTHON=... uses an environment you already have instead of installing one into .venv, PROCESSES=... trains on
# another number of processes.
set -euo pipefail
# torch warns of an old package at every import, the launcher's included, which only the environment reaches.
export PYTHONWARNINGS="ignore:The pynvml package is deprecated:FutureWarning${PYTHONWARNINGS:+,$PYTHONWARNINGS}"

START_DIR=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REPO=$PWD
OUT=quickstart_output
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
  OUT=$1
  shift
  [[ $OUT == /* ]] || OUT=$START_DIR/$OUT
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
HERE=examples/quickstart

stage() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

if [ -z "${PYTHON:-}" ]; then
  stage "environment (made once)"
  bash examples/setup_env.sh
  PYTHON=${MEGATRON_BAGEL_VENV:-$REPO/.venv}/bin/python
fi
# So that it runs from the checkout as it is, installed or not.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
# One thread per process: two training processes on two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SECONDS=0

stage "sample data: pictures of coloured shapes with captions, questions and edits; a tokenizer"
if [ ! -f "$OUT/data/world.json" ]; then
  "$PYTHON" data_tools/make_sample_data.py "$OUT/data" --t2i 3000 --edit 1500 --vlm 3000 --captions-per-image 1
else echo "reusing $OUT/data"; fi

stage "index"
if [ ! -f "$OUT/index/manifest.json" ]; then
  "$PYTHON" data_tools/build_index.py --dataset_config_file "$OUT/data/dataset.yaml" --tokenizer "$OUT/data/tokenizer" --output "$OUT/index"
else echo "reusing $OUT/index"; fi

stage "latents: the autoencoder's view of every picture, stored once instead of encoded at every step"
if [ ! -f "$OUT/latents/latents.json" ]; then
  encode() {
    "$PYTHON" data_tools/cache_latents.py "$OUT/index" --dataset_config_file "$OUT/data/dataset.yaml" \
      --vae $HERE/autoencoder/ae.safetensors --output "$OUT/latents" --num-jobs 2 --job-index "$1"
  }
  encode 0 &
  encode 1
  wait $!
else echo "reusing $OUT/latents"; fi

# One process per GPU, at most two; two where there is none.
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')}
stage "training on $PROCESSES process(es)"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -m megatron_bagel.train --config $HERE/config.yaml \
  --dataset_config_file "$OUT/data/dataset.yaml" --index_dir "$OUT/index" \
  --llm_path "$OUT/data/llm" --vit_path "$OUT/data/vit" --vae_path $HERE/autoencoder/ae.safetensors \
  --latent_cache "$OUT/latents" --results_dir "$OUT/results" --checkpoint_dir "$OUT/checkpoints" --auto_resume True "$@"

stage "export to a folder in BAGEL's released layout"
NEWEST=$(cat "$OUT/checkpoints/latest_checkpointed_iteration.txt")
if [ "$(cat "$OUT/model.step" 2>/dev/null || true)" != "$NEWEST" ]; then
  rm -rf "$OUT/model" "$OUT/generated"
  "$PYTHON" tools/checkpoint_convert/megatron_to_hf.py --checkpoint "$OUT/checkpoints" --output "$OUT/model" --dtype fp32
  echo "$NEWEST" > "$OUT/model.step"
else echo "reusing $OUT/model"; fi

stage "pictures, answers and edits"
if [ ! -f "$OUT/generated/complete" ]; then
  "$PYTHON" $HERE/questions.py make "$OUT/questions"
  OMP_NUM_THREADS=2 "$PYTHON" -m megatron_bagel.generate --model "$OUT/model" --input "$OUT/questions/prompts.jsonl" --out "$OUT/generated" \
    --image-size 64x64 --num-timesteps 25 --timestep-shift 1 --cfg-text-scale 3 --cfg-img-scale 1 --cfg-interval 0 1 --max-length 12 \
    --vae-transform 64 64 --vit-transform 70 70 --batch-size 24
  touch "$OUT/generated/complete"
else echo "reusing $OUT/generated"; fi
"$PYTHON" $HERE/questions.py score "$OUT/questions" "$OUT/generated"

stage "done"
cat <<END
pictures and answers   $OUT/generated (results.jsonl says what was asked), all pictures at once: $OUT/generated/grid.png
loss curves            $OUT/results/loss.png, numbers in $OUT/results/metrics.jsonl
model                  $OUT/model (released layout), $OUT/checkpoints (to go on: the same command with --total_steps 2000)
another picture        $PYTHON -m megatron_bagel.generate --model $OUT/model --image-size 64x64 --num-timesteps 25 --timestep-shift 1 \\
                         --cfg-interval 0 1 --cfg-img-scale 1 --prompt "a red circle in the top left on a white background" --out my_pictures
END
