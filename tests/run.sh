#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests, setting up the environment first if needed. Arguments go to pytest:
#   bash tests/run.sh                            everything but the slow tests
#   bash tests/run.sh tests/layout -k mask       a part of it
#   bash tests/run.sh -m slow                    the slow ones, among them every layout and model kind (tests/training)
#   bash tests/run.sh --cov ...                  prints coverage of each room too, which takes about a third longer
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup_env.sh
python=${MEGATRON_BAGEL_VENV:-$root/.venv}/bin/python
# Tests start hundreds of processes, each of which would compile the package again.
unset PYTHONDONTWRITEBYTECODE
# The whole suite runs in three processes, because tests of several ranks wait for each other often enough to leave one of two cores idle; a file
# stays in one of them, because its tests share fixtures, and files go in the order of tests/conftest.py.
if [ $# -eq 0 ]; then set -- -n 3 --dist loadfile --no-loadscope-reorder; fi
if [ "$1" != --cov ]; then exec "$python" -m pytest -q -m "not slow" "$@"; fi

shift
status=0
"$python" -m pytest -q -m "not slow" --cov --cov-report= "$@" || status=$?
"$python" -m tests.coverage_by_room
exit "$status"
