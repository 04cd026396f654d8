#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests the page of `python -m megatron_bagel.generate --serve` with gradio, which is not in the tests' environment: installs it in a folder of
# its own for the time of the tests, with the environment's versions of everything but Pillow. Arguments go to pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash examples/setup_env.sh
python=${MEGATRON_BAGEL_VENV:-$root/.venv}/bin/python
beside=$(mktemp -d)
trap 'rm -rf "$beside"' EXIT
"$python" -m pip freeze --exclude-editable 2> "$beside/said" | grep -v -i -e '^pillow==' -e ' @ ' > "$beside/same.txt"
gradio=$("$python" -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("megatron-bagel") if r.startswith("gradio")))')
"$python" -m pip install -q --target "$beside/packages" --constraint "$beside/same.txt" "$gradio"
PYTHONPATH=$beside/packages "$python" -m pytest -q tests/inference/web/test_server.py tests/inference/web/test_serve_browser.py "$@"
