# SPDX-License-Identifier: Apache-2.0
"""Run ``python tools/checkpoint_convert/hf_to_megatron.py --model DIR --output DIR``.

The command itself is ``megatron_bagel/cli/convert/hf_to_megatron.py``.
"""

import sys

from megatron_bagel.cli.convert.hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main(prog="hf_to_megatron.py"))
