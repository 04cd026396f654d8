#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests MLflow and trackio, the real packages with local stores. They are not in the tests' environment (trackio wants an older Pillow), so they
# are installed in a folder of their own for the time of the tests. Arguments go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup_env.sh
python=${MEGATRON_BAGEL_VENV:-$root/.venv}/bin/python
beside=$(mktemp -d)
trap 'rm -rf "$beside"' EXIT
"$python" -m pip freeze --exclude-editable 2> "$beside/said" | grep -v -i -E -e '^(pillow|importlib.metadata)==' -e ' @ ' > "$beside/same.txt"
"$python" - > "$beside/wanted.txt" <<'PY'
from importlib.metadata import requires

wanted = (entry.split("; ") for entry in requires("megatron-bagel") if "extra" in entry)
print("\n".join(name for name, condition in wanted if "mlflow" in condition or "trackio" in condition))
PY
"$python" -m pip install -q --target "$beside/packages" --constraint "$beside/same.txt" -r "$beside/wanted.txt"
PYTHONPATH=$beside/packages "$python" -m pytest -q tests/training/observability/test_trackers.py "$@"
