# SPDX-License-Identifier: Apache-2.0
"""Run ``python -m megatron_bagel.evaluate``; the command itself is ``cli/evaluate.py``."""

import sys

from megatron_bagel.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
