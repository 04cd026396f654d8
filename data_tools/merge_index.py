# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/merge_index.py --output DIR``.

The command itself is ``megatron_bagel/cli/data/merge.py``.
"""

import sys

from megatron_bagel.cli.data.merge import main

if __name__ == "__main__":
    sys.exit(main(prog="merge_index.py"))
