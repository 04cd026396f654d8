# SPDX-License-Identifier: Apache-2.0
"""Run ``python -m megatron_bagel COMMAND``; the commands are listed in ``cli/main.py``."""

import sys

from megatron_bagel.cli.main import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m megatron_bagel"))
