#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Teaches a small model to think and then draw, from interleaved samples alone: a question in words ("a red circle at the top on a black
# background: make it blue"), the thought that answers it, and its picture. The exam asks for text and picture in order, and the table marks
# both.
#
#   bash examples/small_world/interleaved.sh OUTPUT_FOLDER [flags of megatron_bagel.train, such as --total_steps 2000]
#
# A second run goes on where the first one stopped. The environment variables are those of run.sh. Pictures and places are those of the
# quickstart: 48 pixels, so that each place is one latent token.
set -euo pipefail

if [ $# -lt 1 ] || [[ $1 == --* ]]; then
  echo "usage: bash examples/small_world/interleaved.sh OUTPUT_FOLDER [flags of megatron_bagel.train]" >&2
  exit 2
fi
OUT=$1
shift

export T2I=0 EDIT=0 VLM=0 QUESTION_STEPS=0 PUZZLE_STEPS=0 INTERLEAVED=${INTERLEAVED:-2000} SIDE=48
export WORLD="--image-size 48 --layers 4 --initializer-range 0.031"
export EXAM=${EXAM:---pictures 0 --questions 0 --edits 0 --puzzles 48}
# The thought is the last text before the picture, and is never dropped in training: there is nothing to guide by.
export GUIDANCE=1 ANSWER_TOKENS=32
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$OUT" --visual_und False --interpolate_pos True --max_latent_size 64 --lr 3.0e-3 \
  --ce_weight 1 --total_steps 550 --save_every 550 --eval_every 550 "$@"
