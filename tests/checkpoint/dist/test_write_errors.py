# SPDX-License-Identifier: Apache-2.0
"""The text of torch's error holds a traceback of every rank; ours holds each reason once."""

from __future__ import annotations

import traceback

from torch.distributed.checkpoint.api import CheckpointException

from megatron_bagel.checkpoint.dist.write_errors import write_reasons


def test_reasons_without_tracebacks() -> None:
    stack = traceback.extract_stack()
    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0: c10::ThrowEnforceNotMet")
    error = CheckpointException("write", {0: (short, stack), 1: (short, stack), 2: (OSError(28, "No space left on device"), stack)})
    assert "Traceback (most recent call last)" in str(error)
    position = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    assert write_reasons(error) == f"{position}; [Errno 28] No space left on device"
    assert write_reasons(OSError(28, "No space left on device", "/x")) == "[Errno 28] No space left on device: '/x'"
