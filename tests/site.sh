#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the documentation as a site, with every warning an error, and follows every link inside it. The packages of the extra `docs` have an
# environment of their own, which is kept; it needs none of this project's other requirements.
#
#   bash tests/site.sh             builds in a temporary folder
#   bash tests/site.sh site        keeps the site; `python -m http.server --directory site` shows it (opened as files, it has no search offline)
#
# MEGATRON_BAGEL_DOCS_VENV names the environment (default: venv-docs in the user's cache).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGATRON_BAGEL_DOCS_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron_bagel/venv-docs}
base=${MEGATRON_BAGEL_PYTHON:-python3}
kept=${1:+$(mkdir -p "$1" && cd "$1" && pwd)}
cd "$root"
requirements=$("$base" - <<'PY'
import ast
from pathlib import Path

# setup.py is read and not run: running it would ask for this project's other requirements.
extras = next(node.value for node in ast.parse(Path("setup.py").read_text()).body
              if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS_REQUIRE")
print("\n".join(ast.literal_eval(next(value for key, value in zip(extras.keys, extras.values) if ast.literal_eval(key) == "docs"))))
PY
)
if [ ! -f "$venv/.requirements" ] || [ "$(cat "$venv/.requirements")" != "$requirements" ]; then
  echo "setting up $venv" >&2
  [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --requirement <(echo "$requirements")
  echo "$requirements" > "$venv/.requirements"
fi
site=${kept:-$(mktemp -d)}
[ -n "$kept" ] || trap 'rm -rf "$site"' EXIT
# Not --quiet, which would hide warnings from --strict too.
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --config-file mkdocs.yml --site-dir "$site"
"$venv/bin/python" tests/docs/site_links.py "$site"
