"""One export of a running job: ``python -m megatron_bagel.training.export_job CHECKPOINT FOLDER``, started by saving.py.

The command for people, with its choices, is tools/checkpoint_convert/megatron_to_hf.py.
"""

from __future__ import annotations

import logging
import os
import sys

from megatron_bagel import platform


def main(checkpoint: str, out: str) -> int:
    """Export the averages in the released types; returns the exit status."""
    os.nice(10)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    platform.install_for_streaming()
    from megatron_bagel.checkpoint.convert import export_checkpoint
    from megatron_bagel.model.positions import sincos_2d

    try:
        export_checkpoint(checkpoint, out, sincos_2d)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    STATUS = main(sys.argv[1], sys.argv[2])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: unloading libraries with threads of their own can abort a process whose folder is written, which would be told as a failure
    # ("terminate called without an active exception", seen once in many exports).
    os._exit(STATUS)
