# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/cache_latents.py INDEX --dataset_config_file YAML --vae FILE --output DIR``.

The command itself is ``megatron_bagel/cli/data/latents.py``.
"""

import sys

from megatron_bagel.cli.data.latents import main

if __name__ == "__main__":
    sys.exit(main(prog="cache_latents.py"))
