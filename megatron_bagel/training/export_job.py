# SPDX-License-Identifier: Apache-2.0
"""Exports one checkpoint of a running job: ``python -m megatron_bagel.training.export_job CHECKPOINT FOLDER``, started by ``saving.py``.

To export a checkpoint by hand, with a choice of weights and types, use ``tools/checkpoint_convert/megatron_to_hf.py``.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.common.console_log import log_to_console


def main(checkpoint: str, out: str) -> int:
    """Export the averaged weights of ``checkpoint`` to the folder ``out`` in the released types, and return the exit status.

    Adapters are merged into their base.
    """
    os.nice(10)
    log_to_console()
    platform.install_for_streaming()
    from megatron_bagel.checkpoint.convert import export_checkpoint
    from megatron_bagel.checkpoint.convert_adapter import merge_adapter
    from megatron_bagel.checkpoint.dist.stored_adapter import adapter_of
    from megatron_bagel.model.positions import sincos_2d

    try:
        if adapter_of(Path(checkpoint)) is None:
            export_checkpoint(checkpoint, out, sincos_2d)
        else:
            merge_adapter(Path(checkpoint), None, Path(out), sincos_2d)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    STATUS = main(sys.argv[1], sys.argv[2])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Exit without unloading libraries. Those with threads of their own can abort the process ("terminate called without an active
    # exception", seen once in many exports), and a complete export would count as failed.
    os._exit(STATUS)
