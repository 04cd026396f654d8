# SPDX-License-Identifier: Apache-2.0
"""Run ``python -m megatron_bagel.plan``; the command itself is ``cli/plan.py``."""

import sys

from megatron_bagel.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
