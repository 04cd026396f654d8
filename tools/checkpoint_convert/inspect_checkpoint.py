# SPDX-License-Identifier: Apache-2.0
"""Run ``python tools/checkpoint_convert/inspect_checkpoint.py show CHECKPOINT``.

The command itself is ``megatron_bagel/cli/convert/inspect_checkpoint.py``.
"""

import sys

from megatron_bagel.cli.convert.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main(prog="inspect_checkpoint.py"))
