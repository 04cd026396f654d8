# SPDX-License-Identifier: Apache-2.0
"""Run ``python -m megatron_bagel.generate``; the command itself is ``cli/generate.py``."""

import sys

from megatron_bagel.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
