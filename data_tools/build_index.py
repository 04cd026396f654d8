# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/build_index.py --dataset_config_file YAML --data-root DIR --tokenizer PATH --output DIR``.

The command itself is ``megatron_bagel/cli/data/build.py``.
"""

import sys

from megatron_bagel.cli.data.build import main

if __name__ == "__main__":
    sys.exit(main(prog="build_index.py"))
