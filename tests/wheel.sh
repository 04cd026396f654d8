#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the sdist, the wheel from the sdist, installs the wheel into a fresh environment, and uses it from an empty folder: every command answers, the path from
# sample data to a picture works without the repository, and so do the commands of README and getting started.
#
#   bash tests/wheel.sh            all of it
#   bash tests/wheel.sh --short    builds, installs, and asks every command for its help
#
# MEGATRON_BAGEL_PYTHON chooses the interpreter (default: that of the environment that examples/setup_env.sh makes).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/examples/setup_env.sh"
base=${MEGATRON_BAGEL_VENV:-$root/.venv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A copy of what git knows, so that nothing untracked gets in and no build folder stays behind.
mkdir "$work/source"
git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --no-dereference --parents -t "$work/source")
(cd "$work/source" && "$base/bin/python" setup.py --quiet sdist --dist-dir "$work/dist" 2> /dev/null)
"$base/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work"/dist/*.tar.gz
echo "built: $(cd "$work/dist" && echo *)"

# Packages that the wheel needs are taken from the environment that the tests use; the package itself only from the wheel.
"$base/bin/python" -m venv "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$base/bin/python" - "$site" <<'PY'
import sys
import sysconfig
from pathlib import Path

# Without the editable install of this project, which would hide files that the wheel lacks.
kept = Path(sysconfig.get_paths()["purelib"])
target = Path(sys.argv[1])
for entry in kept.iterdir():
    if "megatron_bagel" not in entry.name and not (target / entry.name).exists() and entry.suffix != ".pth":
        (target / entry.name).symlink_to(entry)
PY
"$work/venv/bin/python" -m pip install --no-deps "$work"/dist/*.whl | tee "$work/installed.txt"
(cd "$root" && "$base/bin/python" -m tests.docs.expected_output README.md "pip install" "$work/installed.txt")

mkdir "$work/empty"
cd "$work/empty"
export PATH="$work/venv/bin:$PATH" OMP_NUM_THREADS=1
unset PYTHONPATH
python -c 'import megatron_bagel, sys; p = megatron_bagel.__file__; sys.exit("site-packages" not in p and p)'
megatron-bagel --version
for command in train plan generate evaluate quickstart "data build" "data merge" "data verify" "data inspect" "data sample" "data latents" \
  "convert hf-to-megatron" "convert megatron-to-hf" "convert init" "convert inspect"; do
  # shellcheck disable=SC2086 # a command may be two words
  megatron-bagel $command --help > "$work/help.txt" || { echo "megatron-bagel $command --help failed"; exit 1; }
done
if [ "${1:-}" = --short ]; then echo "every command of the wheel answers"; exit; fi
megatron-bagel data sample first/data --t2i 40 --edit 20 --vlm 40
megatron-bagel data build --dataset_config_file first/data/dataset.yaml --tokenizer first/data/tokenizer --output first/index
megatron-bagel data verify first/index
megatron-bagel train --config first/data/train.yaml --dataset_config_file first/data/dataset.yaml --index_dir first/index \
  --llm_path first/data/llm --vit_path first/data/vit --vae_path first/data/vae/ae.safetensors \
  --results_dir first/results --checkpoint_dir first/checkpoints --total_steps 2 --warmup_steps 1 --save_every 2 --num_workers 0
megatron-bagel convert megatron-to-hf --checkpoint first/checkpoints --output first/model --dtype fp32
megatron-bagel generate --model first/model --prompt "a red circle" --image-size 64x64 --num-timesteps 2 --out first/pictures
test -n "$(find first/pictures -name '*.png')"
echo "the wheel works from an empty folder"
cd "$root"
MEGATRON_BAGEL_WHEEL=$work/venv "$base/bin/python" -m pytest -q -m slow tests/docs/test_wheel_commands.py
