# SPDX-License-Identifier: Apache-2.0
"""Run ``python data_tools/make_sample_data.py OUT``.

The command itself is ``megatron_bagel/cli/data/sample.py``.
"""

import sys

from megatron_bagel.cli.data.sample import main

if __name__ == "__main__":
    sys.exit(main(prog="make_sample_data.py"))
