# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/train_tokenizer.py OUT --text FILE ...``.

The command itself is ``megatron_bagel/cli/data/tokenizer.py``.
"""

import sys

from megatron_bagel.cli.data.tokenizer import main

if __name__ == "__main__":
    sys.exit(main(prog="train_tokenizer.py"))
