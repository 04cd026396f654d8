# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/inspect_index.py INDEX``.

The command itself is ``megatron_bagel/cli/data/inspect.py``.
"""

import sys

from megatron_bagel.cli.data.inspect import main

if __name__ == "__main__":
    sys.exit(main(prog="inspect_index.py"))
