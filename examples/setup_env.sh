#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the virtual environment that the tests and the quickstart use, once; does nothing when it is up to date.
#
#   bash examples/setup_env.sh
#
# MEGATRON_BAGEL_PYTHON  interpreter to use (3.10 to 3.13; default: the first such among python3, python3.11, .12, .13, .10)
# MEGATRON_BAGEL_VENV    folder of the environment (default: .venv in the repository)
# MEGATRON_BAGEL_TORCH   torch requirement to install first, for a build that suits your GPU (default: see below)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGATRON_BAGEL_VENV:-$root/.venv}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${MEGATRON_BAGEL_PYTHON:-python3 python3.11 python3.12 python3.13 python3.10}; do
    if command -v "$candidate" >/dev/null && supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup_env.sh: no Python 3.10 to 3.13 among ${MEGATRON_BAGEL_PYTHON:-python3, python3.10 ... python3.13}; set MEGATRON_BAGEL_PYTHON" >&2
  return 1
}

python=$(find_python)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
torch=${MEGATRON_BAGEL_TORCH:-}
if [ -z "$torch" ]; then
  torch="torch>=2.6"
  # Without a GPU the CUDA build would be gigabytes for nothing. On 3.11 this release is the one this project is tested with on
  # CPU, and pip prefers a CPU build of it (2.13.0+cpu) wherever its configuration offers one.
  if [ "$version" = 3.11 ] && ! command -v nvidia-smi >/dev/null; then torch="torch==2.13.0"; fi
fi

stamp=$({ echo "$root $version $torch"; cat "$root/setup.py" "$root/pyproject.toml"; } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ -f "$venv/.setup_stamp" ] && [ "$(cat "$venv/.setup_stamp")" = "$stamp" ]; then exit 0; fi

echo "setting up $venv with Python $version and $torch" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --quiet "$torch"
"$venv/bin/python" -m pip install --quiet --quiet -e "${root}[test]"
echo "$stamp" > "$venv/.setup_stamp"
