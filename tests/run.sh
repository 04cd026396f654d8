#!/usr/bin/env bash
# Runs the tests, setting up the environment first if needed. Arguments go to pytest:
#   bash tests/run.sh                            everything but the slow tests
#   bash tests/run.sh tests/layout -k mask       a part of it
#   bash tests/run.sh -m slow                    the slow ones, among them every layout and model kind (tests/training)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup_env.sh
exec "${MEGATRON_BAGEL_VENV:-$root/.venv}/bin/python" -m pytest -q -m "not slow" "$@"
