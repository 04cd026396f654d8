# SPDX-License-Identifier: Apache-2.0
"""Run ``python -m data_tools.inspect INDEX``. This folder has no ``__init__.py``, so that it does not hide Python's own ``inspect``
from the scripts beside it, as a file ``inspect.py`` would."""

import sys

from megatron_bagel.cli.data.inspect import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m data_tools.inspect"))
