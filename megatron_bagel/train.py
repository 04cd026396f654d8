# SPDX-License-Identifier: Apache-2.0
"""Run ``python -m megatron_bagel.train``; the command itself is ``cli/train.py``."""

import sys

from megatron_bagel.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
