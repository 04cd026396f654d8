# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/verify_index.py INDEX``.

The command itself is ``megatron_bagel/cli/data/verify.py``.
"""

import sys

from megatron_bagel.cli.data.verify import main

if __name__ == "__main__":
    sys.exit(main(prog="verify_index.py"))
