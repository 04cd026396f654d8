# SPDX-License-Identifier: Apache-2.0
"""Run ``python tools/checkpoint_convert/init_from_pretrained.py --llm DIR --output DIR``.

The command itself is ``megatron_bagel/cli/convert/init_from_pretrained.py``.
"""

import sys

from megatron_bagel.cli.convert.init_from_pretrained import main

if __name__ == "__main__":
    sys.exit(main(prog="init_from_pretrained.py"))
