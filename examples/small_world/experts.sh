#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What sparse experts are worth at equal active parameters: the small world's questions, learnt with one dense MLP for each kind of token and
# with four experts of the same width of which one serves a token, on the same data for the same number of steps. Prints a table of the marks
# and the load of each expert at the end.
#
#   bash examples/small_world/experts.sh OUTPUT_FOLDER [flags of megatron_bagel.train, such as --total_steps 300]
#
# LESSON=pictures in the environment trains pictures and edits too, with experts in both kinds. A second run goes on where the first one
# stopped. The other environment variables are those of run.sh.
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == --* ]]; then
  echo "usage: bash examples/small_world/experts.sh OUTPUT_FOLDER [flags of megatron_bagel.train]" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=examples/small_world
PYTHON=${PYTHON:-$PWD/.venv/bin/python}

LESSON=${LESSON:-questions}
if [ "$LESSON" = questions ]; then
  # Pictures to draw take no part, so a few are enough.
  export T2I=${T2I:-8} EDIT=${EDIT:-8} EXAM=${EXAM:---pictures 0 --edits 0} QUESTION_STEPS=0
  set -- --visual_gen False --lr 5.0e-4 --expected_num_tokens 1300 --max_num_tokens 1408 --total_steps 600 --save_every 600 "$@"
fi

one() { # NAME TRAINING_FLAGS...
  local name=$1
  shift
  mkdir -p "$OUT/$name"
  # Data and index are made by the first run, and are the same for both.
  if [ "$name" != dense ]; then
    for PART in data index latents; do ln -sfn "$OUT/dense/$PART" "$OUT/$name/$PART"; done
  fi
  printf '\n#### %s\n' "$name"
  bash $HERE/run.sh "$OUT/$name" "$@"
}

one dense "$@"
# An expert has the dense MLP's width, so a token meets as many parameters, and the router's few.
one experts --num_experts 4 --moe_router_topk 1 --moe_router_pre_softmax True --moe_aux_loss_coeff 0.01 "$@"

printf '\n#### both\n'
"$PYTHON" $HERE/exam.py compare "$OUT"/{dense,experts}
printf '\n#### choices of each expert in the last logged step, by kind and layer (expert_load.png has all steps)\n'
tail -n 1 "$OUT/experts/results/expert_load.jsonl"
