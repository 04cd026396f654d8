# SPDX-License-Identifier: Apache-2.0
"""Run ``python tools/checkpoint_convert/megatron_to_hf.py --checkpoint DIR --output DIR``.

The command itself is ``megatron_bagel/cli/convert/megatron_to_hf.py``.
"""

import sys

from megatron_bagel.cli.convert.megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main(prog="megatron_to_hf.py"))
