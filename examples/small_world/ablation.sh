#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What each part is worth: generation and understanding trained together and alone, and two experts against shared ones, on the same data
# for the same number of steps. Prints one table of the last checkpoints' marks.
#
#   bash examples/small_world/ablation.sh OUTPUT_FOLDER [flags of megatron_bagel.train, such as --total_steps 2000]
#
# A second run goes on where the first one stopped. The environment variables are those of run.sh.
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == --* ]]; then
  echo "usage: bash examples/small_world/ablation.sh OUTPUT_FOLDER [flags of megatron_bagel.train]" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HERE=examples/small_world

one() { # NAME EXAM_FLAGS TRAINING_FLAGS...
  local name=$1 exam=$2
  shift 2
  mkdir -p "$OUT/$name"
  # Data and index are made by the first run, and are the same for all.
  if [ "$name" != both ]; then
    ln -sfn "$OUT/both/data" "$OUT/$name/data"
    ln -sfn "$OUT/both/index" "$OUT/$name/index"
  fi
  printf '\n#### %s\n' "$name"
  QUESTION_STEPS=0 PUZZLE_STEPS=0 WEIGHTS="1.5 1 1.5 1" EXAM=$exam bash $HERE/run.sh "$OUT/$name" "$@"
}

one both "" "$@"
one generation "--questions 0" --visual_und False "$@"
one understanding "--pictures 0 --edits 0" --visual_gen False "$@"
one moe "" --layer_module Qwen2MoEDecoderLayer "$@"
one dense "" --layer_module Qwen2DecoderLayer "$@"

printf '\n#### all\n'
"${PYTHON:-$PWD/.venv/bin/python}" $HERE/exam.py compare "$OUT"/{both,generation,understanding,moe,dense}
