#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to pictures on a laptop: installs into .venv, makes a small world of data, trains a small BAGEL on it, asks it, and shows all
# of it on one page.
#
#   bash examples/quickstart.sh [OUTPUT_FOLDER] [flags of `megatron-bagel quickstart`, such as --seed 1 or --total_steps 5000]
#
# A second run reuses every stage that is complete, and training goes on from its last checkpoint. PYTHON=... uses an environment you
# already have, PROCESSES=... trains on another number of processes.
set -euo pipefail

START_DIR=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
REPO=$PWD
OUT=$REPO/quickstart_output
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
  OUT=$1
  shift
  [[ $OUT == /* ]] || OUT=$START_DIR/$OUT
fi

if [ -z "${PYTHON:-}" ]; then
  echo "== environment (made once)"
  bash examples/setup_env.sh
  PYTHON=${MEGATRON_BAGEL_VENV:-$REPO/.venv}/bin/python
fi
# So that it runs from the checkout as it is, installed or not.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
# torch warns of an old package at every import, which only the environment reaches.
export PYTHONWARNINGS="ignore:The pynvml package is deprecated:FutureWarning${PYTHONWARNINGS:+,$PYTHONWARNINGS}"
exec "$PYTHON" -m megatron_bagel quickstart "$OUT" ${PROCESSES:+--processes "$PROCESSES"} "$@"
