#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a small BAGEL on the sample world on 2 processes, questions first and then everything, and examines every checkpoint. A second,
# smaller model learns puzzles: to think and then draw. The table has pictures from words, questions, edits and puzzles, on (colour, shape)
# pairs that training showed and on pairs that it never did.
#
#   bash examples/small_world/run.sh OUTPUT_FOLDER [flags of megatron_bagel.train, such as --total_steps 2000 --global_seed 1]
#
# A second run goes on where the first one stopped. PYTHON=... chooses the interpreter (default: the .venv of examples/setup_env.sh).
# PROCESSES, T2I, EDIT, VLM, WEIGHTS and DATA_SEED in the environment change how many processes train, how much data of each kind is made
# and how often it is drawn, QUESTION_STEPS how long questions are trained alone (0: not at all), EXAM holds flags of `exam.py ask`.
# PUZZLE_STEPS is how long the puzzles' model trains (0: there is none), PUZZLES how many it learns from, PUZZLE_EXAM flags of `exam.py ask`.
# INTERLEAVED puts that many puzzles among the data of the first model, WORLD holds more flags of make_sample_data.py; SIDE is the side of a
# picture, GUIDANCE the scale of the guidance by text, and ANSWER_TOKENS limits an answer. interleaved.sh, which trains on puzzles alone, sets
# these.
set -euo pipefail
# torch warns of an old package at every import, the launcher's included, which only the environment reaches.
export PYTHONWARNINGS="ignore:The pynvml package is deprecated:FutureWarning${PYTHONWARNINGS:+,$PYTHONWARNINGS}"

if [ $# -lt 1 ] || [[ $1 == --* ]]; then
  echo "usage: bash examples/small_world/run.sh OUTPUT_FOLDER [flags of megatron_bagel.train]" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
if [ ! -x "$PYTHON" ] && ! command -v "$PYTHON" > /dev/null; then
  echo "there is no $PYTHON: run examples/setup_env.sh, or set PYTHON" >&2
  exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
HERE=examples/small_world
AUTOENCODER=megatron_bagel/sample_world/assets/vae/ae.safetensors
# One process per GPU, at most two; two where there is none.
PROCESSES=${PROCESSES:-$("$PYTHON" -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')}
QUESTIONS=600
PUZZLE_STEPS=${PUZZLE_STEPS:-550}
SIDE=${SIDE:-64}
SECONDS=0
stage() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

stage "data: one large shape per picture; four (colour, shape) pairs never appear"
if [ ! -f "$OUT/data/world.json" ]; then
  # shellcheck disable=SC2086 # WEIGHTS and WORLD hold several words
  "$PYTHON" data_tools/make_sample_data.py "$OUT/data" --t2i "${T2I:-4000}" --edit "${EDIT:-4000}" --vlm "${VLM:-4000}" \
    --seed "${DATA_SEED:-0}" --captions-per-image 1 --questions-per-image 5 --edit-kinds recolour --weights ${WEIGHTS:-1.5 2 0.25 1} --vit-image-size 42 \
    --interleaved "${INTERLEAVED:-0}" ${WORLD:-} \
    --hold-out red:square green:circle purple:triangle cyan:cross
else echo "reusing $OUT/data"; fi

stage "index"
if [ ! -f "$OUT/index/manifest.json" ]; then
  "$PYTHON" data_tools/build_index.py --dataset_config_file "$OUT/data/dataset.yaml" --tokenizer "$OUT/data/tokenizer" --output "$OUT/index"
else echo "reusing $OUT/index"; fi

stage "latents: the autoencoder's view of every picture, stored once instead of encoded at every step"
if [ ! -f "$OUT/latents/latents.json" ]; then
  "$PYTHON" data_tools/cache_latents.py "$OUT/index" --dataset_config_file "$OUT/data/dataset.yaml" --vae $AUTOENCODER --output "$OUT/latents"
else echo "reusing $OUT/latents"; fi

train() {
  "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -m megatron_bagel.train --config $HERE/config.yaml \
    --dataset_config_file "$OUT/data/dataset.yaml" --index_dir "$OUT/index" --llm_path "$OUT/data/llm" --vit_path "$OUT/data/vit" \
    --auto_resume True "$@"
}
START=()
if [ "${QUESTION_STEPS:-$QUESTIONS}" -gt 0 ]; then
  stage "training: questions alone, until they are known"
  # At the learning rate that pictures want, and beside their loss, questions are learnt badly, and forgotten once they are known.
  train --visual_gen False --lr 5.0e-4 --expected_num_tokens 1300 --max_num_tokens 1408 "$@" --total_steps "${QUESTION_STEPS:-$QUESTIONS}" --save_every "${QUESTION_STEPS:-$QUESTIONS}" \
    --results_dir "$OUT/questions/results" --checkpoint_dir "$OUT/questions/checkpoints"
  START=(--resume_from "$OUT/questions/checkpoints" --resume_model_only True --allow_missing 'time_embedder*' 'vae2llm*' 'llm2vae*'
    --freeze_und True --freeze_vit True)
fi
stage "training: pictures and edits; what was learnt before is kept"
train --vae_path $AUTOENCODER --latent_cache "$OUT/latents" --results_dir "$OUT/results" --checkpoint_dir "$OUT/checkpoints" \
  ${START[@]+"${START[@]}"} "$@"

stage "exam of every checkpoint"
# shellcheck disable=SC2086 # EXAM holds several words
"$PYTHON" $HERE/exam.py ask "$OUT/data/world.json" "$OUT/exam" ${EXAM:-}
for CHECKPOINT in "$OUT"/checkpoints/[0-9]*/; do
  STEP=$(basename "$CHECKPOINT")
  if [ -f "$OUT/answers/$STEP/complete" ]; then continue; fi
  "$PYTHON" -m megatron_bagel.generate --model "$CHECKPOINT" --input "$OUT/exam/prompts.jsonl" --out "$OUT/answers/$STEP" --resume \
    --image-size "${SIDE}x$SIDE" --num-timesteps 13 --timestep-shift 3 --cfg-text-scale "${GUIDANCE:-1.5}" --cfg-img-scale 1 --cfg-interval 0 1 \
    --max-length "${ANSWER_TOKENS:-12}" --vae-transform "$SIDE" "$SIDE" --vit-transform 42 42 --batch-size 24 > "$OUT/answers.log"
  touch "$OUT/answers/$STEP/complete"
done

PUZZLE_TABLE=()
if [ "$PUZZLE_STEPS" -gt 0 ]; then
  stage "puzzles: a question, a thought and a picture in one sample, and a model of their own"
  EXAM=${PUZZLE_EXAM:-} INTERLEAVED=${PUZZLES:-} bash $HERE/interleaved.sh "$OUT/puzzles" "$@" --lr 3.0e-3 \
    --total_steps "$PUZZLE_STEPS" --save_every "$PUZZLE_STEPS" --eval_every "$PUZZLE_STEPS"
  PUZZLE_TABLE=(--puzzles "$OUT/puzzles")
fi

stage "marks"
"$PYTHON" $HERE/exam.py marks "$OUT/exam" "$OUT/answers" --autoencoder $AUTOENCODER ${PUZZLE_TABLE[@]+"${PUZZLE_TABLE[@]}"}
